//! Camera frames that have not changed: what was computed of them stands. Exact, so it is always on.

use std::sync::Arc;
use std::time::{Duration, Instant};

use candle_core::Result;
use sinew_runtime::CacheUse;

use crate::kernels::{Matrix, Planes};

/// Name of this cache in reports.
pub const FRAMES: &str = "frames";

struct Kept {
    pixels: Planes,
    tokens: Arc<Matrix>,
    took: Duration,
}

/// The newest frame of each camera, with what it became.
#[derive(Default)]
pub struct Frames {
    kept: Vec<Option<Kept>>,
    used: CacheUse,
}

impl Frames {
    /// An inference begins.
    pub fn begin(&mut self) {
        self.used = CacheUse::default();
    }

    /// What camera `camera` sees, `pixels` as the network takes them, became: as before when not a bit of it has
    /// changed, otherwise what `encode` gives. The same memory comes again for the same frame.
    ///
    /// # Errors
    /// Those of `encode`.
    pub fn tokens(
        &mut self,
        camera: usize,
        pixels: &Planes,
        encode: impl FnOnce() -> Result<Matrix>,
    ) -> Result<Arc<Matrix>> {
        self.used.lookups += 1;
        if self.kept.len() <= camera {
            self.kept.resize_with(camera + 1, || None);
        }
        let kept = &mut self.kept[camera];
        if let Some(kept) = kept.as_ref().filter(|kept| same(&kept.pixels, pixels)) {
            self.used.hits += 1;
            self.used.saved += kept.took;
            return Ok(kept.tokens.clone());
        }
        let start = Instant::now();
        let tokens = Arc::new(encode()?);
        let took = start.elapsed();
        *kept = Some(Kept { pixels: pixels.clone(), tokens: tokens.clone(), took });
        Ok(tokens)
    }

    /// What was reused in this inference.
    pub fn used(&self) -> CacheUse {
        self.used
    }
}

/// Whether two pictures have the same size and, bit for bit, the same values.
fn same(a: &Planes, b: &Planes) -> bool {
    let equal = |(a, b): (&f32, &f32)| a.to_bits() == b.to_bits();
    let sizes = (a.size, a.values.dims()) == (b.size, b.values.dims());
    sizes && a.values.values().iter().zip(b.values.values()).all(equal)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(values: [f32; 2]) -> Planes {
        Planes::new(&values, (1, 2)).expect("two values")
    }

    #[test]
    fn a_frame_is_computed_again_when_one_bit_differs() {
        let mut frames = Frames::default();
        let mut computed = 0;
        let mut see = |frames: &mut Frames, camera, values| {
            let pixels = frame(values);
            let tokens = frames.tokens(camera, &pixels, || {
                computed += 1;
                Ok(pixels.values.clone().scaled(2.0))
            });
            (tokens.expect("they can be doubled").values().to_vec(), computed)
        };
        frames.begin();
        assert_eq!(see(&mut frames, 0, [1.0, 2.0]), (vec![2.0, 4.0], 1));
        assert_eq!(see(&mut frames, 1, [1.0, 2.0]), (vec![2.0, 4.0], 2), "another camera");
        assert_eq!(frames.used().hits, 0);
        frames.begin();
        assert_eq!(see(&mut frames, 0, [1.0, 2.0]), (vec![2.0, 4.0], 2));
        let near = f32::from_bits(2f32.to_bits() + 1);
        assert_eq!(see(&mut frames, 1, [1.0, near]).1, 3);
        assert_eq!((frames.used().lookups, frames.used().hits), (2, 1));
        // Zero and minus zero are equal numbers, not equal bits.
        assert_eq!(see(&mut frames, 0, [0.0, 2.0]).1, 4);
        assert_eq!(see(&mut frames, 0, [-0.0, 2.0]).1, 5);
    }

    #[test]
    fn other_shapes_are_not_the_same() {
        let a = frame([1.0, 1.0]);
        assert!(!same(&a, &Planes::new(&[1.0, 1.0], (2, 1)).expect("two values")));
        assert!(!same(&a, &Planes::new(&[1.0; 4], (1, 2)).expect("two planes")));
        assert!(same(&a, &frame([1.0, 1.0])));
    }
}
