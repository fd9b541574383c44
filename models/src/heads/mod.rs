//! What makes actions out of a backbone's numbers, apart from any network.

mod anchors;
pub mod bins;
pub mod ddpm;
pub mod fast;
pub mod flow;
pub mod masked;
mod smooth;

pub use anchors::{AnchorSearch, Anchored};
pub use bins::Bins;
pub use masked::{Confidence, DecodeError, MaskSchedule, MaskedDecoder, Masking};
pub use smooth::smooth;
