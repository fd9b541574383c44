//! A simulated desk arm with cameras, tasks, ground truth and a scripted expert.
//!
//! [`World`] is the physics on a virtual clock; [`Episode`] adds a task and its judge; [`gym`] steps
//! many of them for training; [`device`] runs one against the real clock behind the runtime's traits.

mod body;
pub mod description;
pub mod device;
pub mod episode;
pub mod expert;
pub mod ground_truth;
pub mod gym;
pub mod kinematics;
pub mod raster;
pub mod render;
pub mod scene;
pub mod servo;
pub mod task;
pub mod world;

pub use description::{ArmDescription, DescriptionError, JOINT_NAMES, JOINTS};
pub use device::{SimArm, SimCamera, SimConfig, SimHandle};
pub use episode::Episode;
pub use expert::Expert;
pub use ground_truth::GroundTruth;
pub use kinematics::Joints;
pub use render::{CameraKind, Renderer};
pub use scene::Scene;
pub use task::{BinSide, Colour, Task};
pub use world::{Snapshot, World};
