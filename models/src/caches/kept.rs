//! What is kept of the cameras' pictures from inference to inference: rows of the vision tower and of the prefix.

use std::sync::Arc;
use std::time::{Duration, Instant};

use candle_core::Result;
use sinew_runtime::{CacheUse, Opening, Unused};

use super::vision::{Patches, Recompute, VISION, VisionConfig};
use crate::backbones::KeysValues;
use crate::backbones::siglip::{Siglip, TowerRows};
use crate::kernels::{Matrix, Planes};

/// One camera's picture in the tower.
///
/// Memory: two rows of the tower's width for each patch and layer, and one for its output.
pub struct KeptTower {
    patches: Patches,
    rows: TowerRows,
    /// Time of the newest whole computation.
    whole: Duration,
    used: CacheUse,
}

impl KeptTower {
    fn new(config: VisionConfig) -> Self {
        let (patches, rows) = (Patches::new(config), TowerRows::default());
        Self { patches, rows, whole: Duration::ZERO, used: CacheUse::default() }
    }

    /// `pixels` (in [−1, 1]), which `tower` cuts into `grid` patches, through it: those that changed,
    /// or all.
    ///
    /// # Errors
    /// Those of the tower.
    pub fn forward(
        &mut self,
        tower: &Siglip,
        pixels: &Planes,
        grid: (usize, usize),
    ) -> Result<Matrix> {
        let count = grid.0 * grid.1;
        let start = Instant::now();
        let mut used = CacheUse { lookups: number(count), ..CacheUse::default() };
        let features = match self.patches.see(pixels.values.values(), tower.patch(), grid) {
            Recompute::All(why, alike) => {
                let before = std::mem::take(&mut self.rows);
                let features = tower.forward_all(pixels, &mut self.rows)?;
                self.whole = start.elapsed();
                if let Some(error) = relative(before.hidden(), self.rows.hidden(), &alike) {
                    self.patches.checked(error);
                }
                used.unused = Some(why);
                features
            }
            Recompute::Only(rows) => {
                let features = tower.forward_rows(pixels, &rows, &mut self.rows)?;
                used.hits = number(count - rows.len());
                used.saved = self.whole.saturating_sub(start.elapsed());
                features
            }
        };
        (used.opening, used.bound) = self.patches.opening();
        self.used = used;
        Ok(features)
    }
}

/// The length of `before − now` relative to that of `now`, over the rows `rows`; none without any.
fn relative(before: &Matrix, now: &Matrix, rows: &[usize]) -> Option<f64> {
    if rows.is_empty() || before.dims() != now.dims() {
        return None;
    }
    let (mut off, mut whole) = (0.0, 0.0);
    for row in rows {
        for (a, b) in before.row(*row).iter().zip(now.row(*row)) {
            off += f64::from(a - b).powi(2);
            whole += f64::from(*b).powi(2);
        }
    }
    Some((off / whole.max(f64::MIN_POSITIVE)).sqrt())
}

fn number(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}

/// The prefix in the text layers.
pub struct KeptPrefix {
    config: VisionConfig,
    /// Embeddings that the rows were last computed of, `[P, D]`.
    embeddings: Matrix,
    layers: Vec<Arc<KeysValues>>,
    age: u32,
    used: CacheUse,
}

impl KeptPrefix {
    fn new(config: VisionConfig) -> Self {
        let (embeddings, layers) = (Matrix::default(), Vec::new());
        Self { config, embeddings, layers, age: 0, used: CacheUse::default() }
    }

    /// The rows of `embeddings` (`[P, D]`) that are not, bit for bit, those of before, rising, the last always among them;
    /// `None` when all are to be computed and given to [`Self::keep`]. What is asked here must then be done.
    ///
    /// When no row but the last has changed, what is kept is exact, as no other token sees the last. Otherwise it is an
    /// approximation that [`VisionConfig::prefix`] must allow: what is kept has seen the other tokens as they were.
    pub fn changed(&mut self, embeddings: &Matrix) -> Option<Vec<usize>> {
        let length = embeddings.rows();
        let fits = embeddings.dims() == self.embeddings.dims() && !self.layers.is_empty();
        let same = |r: &usize| {
            let pairs = embeddings.row(*r).iter().zip(self.embeddings.row(*r));
            pairs.into_iter().all(|(a, b)| a.to_bits() == b.to_bits())
        };
        let rows = (0..length).filter(|r| r + 1 == length || !fits || !same(r));
        let rows: Vec<usize> = rows.collect();
        self.age += 1;
        let refused = rows.len() > 1 && !self.config.prefix;
        let unused = match refused || rows.len() as f64 > self.config.most * length as f64 {
            _ if !fits => Some(Unused::Fresh),
            _ if rows.len() == 1 && !self.config.prefix => None,
            true => Some(Unused::Changed),
            false => (self.age >= self.config.refresh.max(1)).then_some(Unused::Refresh),
        };
        let hits = if unused.is_none() { number(length - rows.len()) } else { 0 };
        self.used = CacheUse { lookups: number(length), hits, unused, ..CacheUse::default() };
        self.embeddings = embeddings.clone();
        unused.is_none().then_some(rows)
    }

    /// Keys and values of all layers.
    pub fn keep(&mut self, layers: &[Arc<KeysValues>]) {
        (self.layers, self.age) = (layers.to_vec(), 0);
    }

    /// All keys and values of layer `layer`, with those of `rows` new.
    ///
    /// # Errors
    /// When there is no such layer, or the shapes do not fit.
    pub fn layer(
        &mut self,
        layer: usize,
        rows: &[usize],
        new: &KeysValues,
    ) -> Result<Arc<KeysValues>> {
        let Some(kept) = self.layers.get_mut(layer) else {
            candle_core::bail!("nothing is kept of layer {layer}");
        };
        // Whoever still reads those of before keeps them as they are.
        Arc::make_mut(kept).put(rows, &new.keys.all(), &new.values.all())?;
        Ok(kept.clone())
    }
}

/// What a policy keeps of what it sees.
pub struct Seen {
    config: VisionConfig,
    towers: Vec<KeptTower>,
    prefix: KeptPrefix,
    /// Cameras whose picture was computed, wholly or not, in this inference.
    computed: Vec<usize>,
    prefix_asked: bool,
}

impl Seen {
    /// Nothing yet.
    pub fn new(config: VisionConfig) -> Self {
        let (towers, prefix) = (Vec::new(), KeptPrefix::new(config));
        Self { config, towers, prefix, computed: Vec::new(), prefix_asked: false }
    }

    /// Its settings.
    pub fn config(&self) -> VisionConfig {
        self.config
    }

    /// An inference begins; `dropped`: the one before it made no chunk, and is not built on.
    pub fn begin(&mut self, dropped: bool) {
        if dropped {
            self.forget();
        }
        self.computed.clear();
        self.prefix_asked = false;
    }

    /// Nothing is kept any more; how far the caches are open stays.
    pub fn forget(&mut self) {
        for tower in &mut self.towers {
            tower.rows = TowerRows::default();
            tower.patches.forget();
        }
        self.prefix = KeptPrefix::new(self.config);
    }

    /// What `encode` makes of camera `camera` with its kept rows.
    ///
    /// # Errors
    /// Those of `encode`; what is kept is forgotten then.
    pub fn image(
        &mut self,
        camera: usize,
        encode: impl FnOnce(&mut KeptTower) -> Result<Matrix>,
    ) -> Result<Matrix> {
        while self.towers.len() <= camera {
            self.towers.push(KeptTower::new(self.config));
        }
        self.computed.push(camera);
        let made = encode(&mut self.towers[camera]);
        if made.is_err() {
            self.forget();
        }
        made
    }

    /// The prefix's rows.
    pub fn prefix(&mut self) -> &mut KeptPrefix {
        self.prefix_asked = true;
        &mut self.prefix
    }

    /// What the vision cache did in this inference; none when no picture had to be computed.
    pub fn used(&self) -> Option<(&'static str, CacheUse)> {
        let towers = || self.computed.iter().filter_map(|camera| self.towers.get(*camera));
        let first = towers().next()?.used;
        let mut all = towers().skip(1).fold(first, |all, tower| CacheUse {
            lookups: all.lookups + tower.used.lookups,
            hits: all.hits + tower.used.hits,
            saved: all.saved + tower.used.saved,
            bound: all.bound.zip(tower.used.bound).map(|(a, b)| a.max(b)),
            opening: narrower(all.opening, tower.used.opening),
            unused: all.unused.or(tower.used.unused),
            ..all
        });
        if all.hits > 0 {
            all.unused = None;
        }
        Some((VISION, all))
    }

    /// What was kept of the prefix in this inference; none when it was not computed.
    pub fn prefix_used(&self) -> Option<CacheUse> {
        self.prefix_asked.then_some(self.prefix.used)
    }
}

fn narrower(a: Opening, b: Opening) -> Opening {
    match (a, b) {
        (Opening::Closed, _) | (_, Opening::Closed) => Opening::Closed,
        (Opening::Narrow, _) | (_, Opening::Narrow) => Opening::Narrow,
        _ => Opening::Open,
    }
}
