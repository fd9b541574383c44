//! Camera frames that have not changed: what was computed of them stands. Exact, so it is always on.

use std::time::{Duration, Instant};

use candle_core::{CpuStorage, Result, Storage, Tensor};
use sinew_runtime::CacheUse;

/// Name of this cache in reports.
pub const FRAMES: &str = "frames";

struct Kept {
    pixels: Tensor,
    tokens: Tensor,
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
    /// changed, otherwise what `encode` gives. The same tensor (by its id) comes again for the same frame.
    ///
    /// # Errors
    /// Those of `encode`.
    pub fn tokens(
        &mut self,
        camera: usize,
        pixels: &Tensor,
        encode: impl FnOnce() -> Result<Tensor>,
    ) -> Result<Tensor> {
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
        let tokens = encode()?;
        let took = start.elapsed();
        *kept = Some(Kept { pixels: pixels.clone(), tokens: tokens.clone(), took });
        Ok(tokens)
    }

    /// What was reused in this inference.
    pub fn used(&self) -> CacheUse {
        self.used
    }
}

/// Whether two tensors have the same shape and, bit for bit, the same values; false for what is not plainly laid out.
fn same(a: &Tensor, b: &Tensor) -> bool {
    if a.id() == b.id() {
        return true;
    }
    if a.shape() != b.shape() {
        return false;
    }
    let ((a, a_layout), (b, b_layout)) = (a.storage_and_layout(), b.storage_and_layout());
    match (&*a, a_layout.contiguous_offsets(), &*b, b_layout.contiguous_offsets()) {
        (
            Storage::Cpu(CpuStorage::F32(a)),
            Some((a_start, a_end)),
            Storage::Cpu(CpuStorage::F32(b)),
            Some((b_start, b_end)),
        ) => {
            let bits = |v: &f32| v.to_bits();
            a[a_start..a_end].iter().map(bits).eq(b[b_start..b_end].iter().map(bits))
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    fn frame(values: [f32; 2]) -> Tensor {
        Tensor::from_slice(&values, 2, &Device::Cpu).expect("two values")
    }

    #[test]
    fn a_frame_is_computed_again_when_one_bit_differs() {
        let mut frames = Frames::default();
        let mut computed = 0;
        let mut see = |frames: &mut Frames, camera, values| {
            let pixels = frame(values);
            let tokens = frames.tokens(camera, &pixels, || {
                computed += 1;
                &pixels * 2.0
            });
            let tokens = tokens.expect("they can be doubled");
            (tokens.to_vec1::<f32>().expect("two values"), computed)
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
        assert!(!same(&a, &a.reshape((1, 2)).expect("two values")));
        assert!(same(&a, &frame([1.0, 1.0])));
        assert!(!same(
            &a.broadcast_as((2, 2)).expect("it fits"),
            &a.broadcast_as((2, 2)).expect("it fits")
        ));
    }
}
