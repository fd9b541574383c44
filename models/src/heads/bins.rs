//! Action values as tokens: uniform bins over the normalised range.
//!
//! Source: RT-2 (arXiv 2307.15818) and OpenVLA (arXiv 2406.09246), `prismatic/vla/action_tokenizer.py`:
//! `N` classes, `N` edges from −1 to 1, so `N − 1` bins; the last class shares the last bin's centre. The
//! range is what the normaliser maps to [−1, 1]: the 1st to the 99th percentile as published, or the whole.

/// The most classes that a head may have.
pub const MOST: usize = 1 << 16;

/// Uniform bins over [−1, 1].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bins {
    classes: usize,
}

impl Bins {
    /// Bins of a head with so many classes; none unless there are 2 to [`MOST`].
    pub fn new(classes: usize) -> Option<Self> {
        (2..=MOST).contains(&classes).then_some(Self { classes })
    }

    /// Classes `N` of the head.
    pub fn classes(self) -> usize {
        self.classes
    }

    /// The bin that the normalised value `x` lies in; values outside [−1, 1] lie in the first or last.
    pub fn encode(self, x: f32) -> usize {
        let bins = self.classes - 1;
        let place = (x.clamp(-1.0, 1.0) + 1.0) * (0.5 * bins as f32);
        (place as usize).min(bins - 1)
    }

    /// The centre of bin `class`.
    pub fn decode(self, class: usize) -> f32 {
        let bins = self.classes - 1;
        (class.min(bins - 1) as f32 + 0.5) * (2.0 / bins as f32) - 1.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// OpenVLA counts its tokens down from the vocabulary's end, 31,999 of 32,000 being the first bin.
    #[test]
    fn values_are_those_of_openvla() {
        let bins = Bins::new(256).expect("2 to 65,536");
        for (x, token, centre) in [
            (-1.0, 31_999, -0.996_078),
            (-0.5, 31_936, -0.501_961),
            (0.0, 31_872, 0.0),
            (0.25, 31_840, 0.250_980),
        ] {
            assert_eq!(31_999 - bins.encode(x), token, "{x}");
            assert!((bins.decode(31_999 - token) - centre).abs() < 1e-6, "{x}");
        }
        assert!((bins.decode(bins.encode(1.0)) - 0.996_078).abs() < 1e-6);
        assert_eq!(bins.decode(255), bins.decode(254), "the last class shares the last bin");
    }

    #[test]
    fn every_centre_is_in_its_bin() {
        for classes in [2, 3, 17, 256, 1000] {
            let bins = Bins::new(classes).expect("2 to 65,536");
            for class in 0..classes - 1 {
                assert_eq!(bins.encode(bins.decode(class)), class, "{class} of {classes}");
            }
        }
        assert_eq!(Bins::new(1), None);
    }

    #[test]
    fn no_value_is_out_of_range() {
        let bins = Bins::new(256).expect("2 to 65,536");
        assert_eq!([-9.0, f32::NEG_INFINITY, f32::NAN].map(|x| bins.encode(x)), [0; 3]);
        assert_eq!([9.0, f32::INFINITY].map(|x| bins.encode(x)), [254; 2]);
    }
}
