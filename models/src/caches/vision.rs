//! Which patches of a camera's picture are computed again, and which keep what they were.
//!
//! Source: VLA-Cache (arXiv 2502.02175): patches whose pixels are alike in two frames keep their keys and values. There
//! it is the language model that reuses them; here the vision tower's layers do too, which is where the time goes. Both
//! are approximations even for patches that are exactly the same, because attention mixes patches: what is kept has seen
//! the picture as it was.

use sinew_runtime::{Opening, Unused};

use super::monitor::{Monitor, MonitorConfig};

/// Name of the vision cache in reports.
pub const VISION: &str = "vision";

/// Settings of the vision cache.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct VisionConfig {
    /// Patches at least so alike (cosine of their pixels, 0 to 1 each) are unchanged …
    pub similarity: f64,
    /// … when their pixels also differ by no more than this on average (of 1): the cosine does not see brightness, and dark
    /// patches are mostly noise to it.
    pub difference: f64,
    /// Patches around a changed one that count as changed.
    pub halo: usize,
    /// Inferences from one whole computation to the next.
    pub refresh: u32,
    /// When more than this share of the patches has changed, all are computed.
    pub most: f64,
    /// Whether tokens of the prefix that did not change keep their keys and values while others changed.
    pub prefix: bool,
    /// Relative error of the kept patches' features above which the cache closes.
    pub limit: f64,
}

impl Default for VisionConfig {
    fn default() -> Self {
        Self {
            similarity: 0.996,
            difference: 0.02,
            halo: 0,
            refresh: 10,
            most: 0.6,
            prefix: false,
            limit: 0.15,
        }
    }
}

/// What to compute of a picture.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Recompute {
    /// All of it, and why; with the patches that could have been kept.
    All(Unused, Vec<usize>),
    /// These patches, rising.
    Only(Vec<usize>),
}

/// One camera's patches from picture to picture. Pure: pixels in, patches to compute out.
#[derive(Debug, Clone)]
pub struct Patches {
    config: VisionConfig,
    monitor: Monitor,
    /// Side of a patch (pixels), and the grid's rows and columns.
    side: usize,
    grid: (usize, usize),
    /// Pixels that each patch was last computed of, `[3, height, width]`.
    known: Vec<f32>,
    /// Inferences since all were computed.
    age: u32,
}

impl Patches {
    /// Nothing known yet.
    pub fn new(config: VisionConfig) -> Self {
        // Whole computations are what is compared: few, so the bound is of the tenth.
        let monitor =
            MonitorConfig { limit: config.limit, exceeded: 0.1, window: 39, calm: 2, share: 0.0 };
        let monitor = Monitor::new(monitor);
        Self { config, monitor, side: 0, grid: (0, 0), known: Vec::new(), age: 0 }
    }

    /// What to compute of the picture `pixels` (`[3, rows·side, columns·side]`, in [−1, 1]); the next picture is compared
    /// with it.
    pub fn see(&mut self, pixels: &[f32], side: usize, grid: (usize, usize)) -> Recompute {
        let count = grid.0 * grid.1;
        if (self.side, self.grid) != (side, grid) || self.known.len() != pixels.len() {
            (self.side, self.grid, self.age) = (side, grid, 0);
            self.known = pixels.to_vec();
            return Recompute::All(Unused::Fresh, Vec::new());
        }
        let mut changed: Vec<bool> = (0..count).map(|p| self.changed(pixels, p)).collect();
        if self.config.halo > 0 {
            changed = self.widened(&changed);
        }
        let listed = |is: bool| (0..count).filter(|p| changed[*p] == is).collect::<Vec<_>>();
        self.age += 1;
        let refresh = match self.monitor.opening() {
            Opening::Open => self.config.refresh.max(1),
            Opening::Narrow => 2.min(self.config.refresh.max(1)),
            Opening::Closed => 1,
        };
        let only = listed(true);
        let why = match only.len() as f64 > self.config.most * count as f64 {
            true => Some(Unused::Changed),
            false => (self.age >= refresh).then_some(Unused::Refresh),
        };
        match why {
            Some(why) => {
                self.age = 0;
                self.known.copy_from_slice(pixels);
                Recompute::All(why, listed(false))
            }
            None => {
                only.iter().for_each(|p| self.learn(pixels, *p));
                Recompute::Only(only)
            }
        }
    }

    /// The kept features of the patches that a whole computation could have kept had this relative error.
    pub fn checked(&mut self, error: f64) {
        self.monitor.checked(error);
        self.monitor.chunk_made();
    }

    /// How far the cache is open, and the bound of its error.
    pub fn opening(&self) -> (Opening, Option<f64>) {
        (self.monitor.opening(), self.monitor.bound())
    }

    /// The next picture is computed whole.
    pub fn forget(&mut self) {
        self.known.clear();
    }

    fn rows(&self, patch: usize) -> impl Iterator<Item = std::ops::Range<usize>> + use<> {
        let (side, (rows, columns)) = (self.side, self.grid);
        let (row, column) = (patch / columns, patch % columns);
        let width = columns * side;
        (0..3 * side).map(move |line| {
            let (plane, y) = (line / side, row * side + line % side);
            let start = (plane * rows * side + y) * width + column * side;
            start..start + side
        })
    }

    fn changed(&self, pixels: &[f32], patch: usize) -> bool {
        let (mut product, mut before, mut now, mut apart) = (0.0f64, 0.0f64, 0.0f64, 0.0f64);
        for range in self.rows(patch) {
            // Four sums of a row in single precision, then double.
            let (mut p, mut a, mut b, mut d) = (0f32, 0f32, 0f32, 0f32);
            for (x, y) in self.known[range.clone()].iter().zip(&pixels[range]) {
                let (x, y) = (0.5 * (x + 1.0), 0.5 * (y + 1.0));
                p += x * y;
                a += x * x;
                b += y * y;
                d += (x - y).abs();
            }
            product += f64::from(p);
            before += f64::from(a);
            now += f64::from(b);
            apart += f64::from(d);
        }
        let mean = apart / (3 * self.side * self.side).max(1) as f64;
        if mean == 0.0 {
            // Nothing is so alike: every patch counts as changed.
            return self.config.similarity > 1.0;
        }
        let alike = product / (before * now).sqrt().max(f64::MIN_POSITIVE);
        // A value that is no number is a change.
        !(alike >= self.config.similarity && mean <= self.config.difference)
    }

    fn learn(&mut self, pixels: &[f32], patch: usize) {
        for range in self.rows(patch) {
            self.known[range.clone()].copy_from_slice(&pixels[range]);
        }
    }

    fn widened(&self, changed: &[bool]) -> Vec<bool> {
        let (rows, columns) = self.grid;
        let halo = self.config.halo;
        let near = |at: usize, most: usize| at.saturating_sub(halo)..(at + halo + 1).min(most);
        (0..rows * columns)
            .map(|p| {
                near(p / columns, rows)
                    .any(|r| near(p % columns, columns).any(|c| changed[r * columns + c]))
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SIDE: usize = 2;
    const GRID: (usize, usize) = (3, 4);
    const COUNT: usize = 12;
    const SIZE: usize = 3 * COUNT * SIDE * SIDE;

    /// A picture whose patch `p` is of the value `values[p]`.
    fn picture(values: &[f32]) -> Vec<f32> {
        let width = GRID.1 * SIDE;
        (0..SIZE)
            .map(|i| {
                let (y, x) = (i / width % (GRID.0 * SIDE), i % width);
                values[y / SIDE * GRID.1 + x / SIDE]
            })
            .collect()
    }

    fn see(patches: &mut Patches, values: &[f32]) -> Recompute {
        patches.see(&picture(values), SIDE, GRID)
    }

    fn config() -> VisionConfig {
        VisionConfig { refresh: 100, most: 1.0, ..VisionConfig::default() }
    }

    #[test]
    fn only_what_changed_is_computed_and_the_first_picture_is_whole() {
        let mut patches = Patches::new(config());
        let mut values = [0.1f32; COUNT];
        assert_eq!(see(&mut patches, &values), Recompute::All(Unused::Fresh, vec![]));
        assert_eq!(see(&mut patches, &values), Recompute::Only(vec![]));
        values[5] = 0.4;
        values[11] = -0.9;
        assert_eq!(see(&mut patches, &values), Recompute::Only(vec![5, 11]));
        assert_eq!(see(&mut patches, &values), Recompute::Only(vec![]));
        values[0] = f32::NAN;
        assert_eq!(see(&mut patches, &values), Recompute::Only(vec![0]));
        patches.forget();
        assert_eq!(see(&mut patches, &values), Recompute::All(Unused::Fresh, vec![]));
    }

    #[test]
    fn slow_drift_is_seen_in_the_end() {
        let mut patches = Patches::new(config());
        see(&mut patches, &[0.0; COUNT]);
        let drift = |k: usize| [0.009 * k as f32; COUNT];
        let seen = (1..20).find(|k| see(&mut patches, &drift(*k)) != Recompute::Only(vec![]));
        // Half of it is a difference of pixels in 0..1; the limit is 0.02.
        assert_eq!(seen, Some(5));
    }

    #[test]
    fn whole_computations_come_in_time_and_when_too_much_changed() {
        let often = VisionConfig { refresh: 3, most: 0.5, ..VisionConfig::default() };
        let mut patches = Patches::new(often);
        let mut values = [0.1f32; COUNT];
        let kept = (0..COUNT).collect::<Vec<_>>();
        let mut whole = Vec::new();
        for k in 0..7 {
            if let Recompute::All(why, alike) = see(&mut patches, &values) {
                assert_eq!(alike, if k == 0 { vec![] } else { kept.clone() });
                whole.push((k, why));
            }
        }
        assert_eq!(whole, [(0, Unused::Fresh), (3, Unused::Refresh), (6, Unused::Refresh)]);
        values[..7].fill(0.9);
        let all = Recompute::All(Unused::Changed, (7..COUNT).collect());
        assert_eq!(see(&mut patches, &values), all);
        // Errors above the limit: everything is computed each time.
        (0..2).for_each(|_| patches.checked(9.0));
        assert_eq!(patches.opening().0, Opening::Closed);
        for _ in 0..3 {
            assert_eq!(see(&mut patches, &values), Recompute::All(Unused::Refresh, kept.clone()));
        }
    }

    #[test]
    fn a_halo_widens_what_changed() {
        let mut patches = Patches::new(VisionConfig { halo: 1, ..config() });
        let mut values = [0.1f32; COUNT];
        see(&mut patches, &values);
        values[4] = 0.9;
        assert_eq!(see(&mut patches, &values), Recompute::Only(vec![0, 1, 4, 5, 8, 9]));
    }

    proptest! {
        #[test]
        fn a_higher_threshold_never_keeps_more(
            before in prop::collection::vec(-1.0..1.0f32, SIZE),
            noise in prop::collection::vec(-0.05..0.05f32, SIZE),
            similarity in 0.9..1.0f64, difference in 0.0..0.05f64
        ) {
            let after: Vec<f32> = before.iter().zip(&noise).map(|(a, b)| a + b).collect();
            let changed = |similarity, difference| {
                let mut patches = Patches::new(VisionConfig { similarity, difference, ..config() });
                patches.see(&before, SIDE, GRID);
                match patches.see(&after, SIDE, GRID) {
                    Recompute::Only(rows) => rows,
                    all => panic!("{all:?}"),
                }
            };
            let rows = changed(similarity, difference);
            let stricter = changed((similarity + 1.0) / 2.0, difference / 2.0);
            prop_assert!(rows.iter().all(|row| stricter.contains(row)));
            prop_assert_eq!(changed(2.0, 1.0).len(), COUNT);
        }
    }
}
