//! A block of queries on its way through the keys, in 8 bits.
//!
//! Queries and keys are rounded row by row, values a few keys at a time for each of their columns, the softmax's weights
//! a few keys at a time for each query; each of these runs has a scale of its own. The keys' mean is taken off them
//! before: that moves all scores of a query alike, which a softmax does not see, and in trained networks it is what
//! makes some columns of the keys much larger than the others (Zhang et al. 2024, arXiv 2410.02367).

use std::cell::RefCell;
use std::ops::Range;

use super::columns::Columns;
use super::{Heads, KEYS, Sizes};
use crate::kernels::isa::Isa;
use crate::kernels::pool::Cell;
use crate::kernels::simd::{
    Aligned, BLOCK, Interleave, Rounding, TILE_COLUMNS, TILE_ROWS, Weigh, Words, prefetch,
};
use crate::kernels::strips::Tiles;

thread_local! {
    /// Rows on their way into order.
    static GATHERED: RefCell<Gathered> = const { RefCell::new(Gathered::new()) };
}

/// Rows, and what they are rounded to.
struct Gathered {
    /// The keys' mean.
    mean: Vec<f32>,
    floats: Vec<f32>,
    words: Vec<u32>,
}

/// What a thread keeps of the block that it works on.
pub(super) struct Scratch {
    /// Sums, the same turned, scores.
    floats: Aligned<f32>,
    /// Queries, weights.
    words: Aligned<u32>,
}

/// How the keys and values of a head lie in memory: some keys, then their values.
#[derive(Clone, Copy)]
pub(super) struct Plan {
    isa: Isa,
    columns: usize,
    size: usize,
}

/// Where the pieces of a part lie in it.
struct Places {
    /// Tile after tile of keys, `[word][key]`.
    keys: Range<usize>,
    /// One for each key.
    starts: Range<usize>,
    /// One for each key.
    key_scales: Range<usize>,
    /// Tile after tile of the values' columns, `[word of keys][column]`.
    values: Range<usize>,
    /// One for each column.
    value_scales: Range<usize>,
}

/// What a unit of work needs.
pub(super) struct Block<'a> {
    pub plan: Plan,
    pub q: Heads<'a>,
    /// The head, [`Plan::pack`]ed.
    pub packed: &'a [u32],
    pub sizes: Sizes,
}

impl Gathered {
    const fn new() -> Self {
        Self { mean: Vec::new(), floats: Vec::new(), words: Vec::new() }
    }
}

impl Scratch {
    pub const fn new() -> Self {
        Self { floats: Aligned::new(), words: Aligned::new() }
    }
}

impl Plan {
    pub fn new(isa: Isa, columns: usize, size: usize) -> Self {
        Self { isa, columns, size }
    }

    /// Values of a row, filled up to whole blocks.
    fn filled(&self) -> usize {
        self.size.next_multiple_of(BLOCK)
    }

    /// Words of a row.
    fn words(&self) -> usize {
        self.filled() / self.isa.group()
    }

    fn places(&self) -> Places {
        let mut end = 0;
        let mut next = |length: usize| {
            end += length;
            end - length..end
        };
        Places {
            keys: next(KEYS * self.words()),
            starts: next(KEYS),
            key_scales: next(KEYS),
            values: next(self.size * KEYS / self.isa.group()),
            value_scales: next(self.size),
        }
    }

    /// Numbers of a head.
    pub fn head(&self) -> usize {
        self.columns.div_ceil(KEYS) * self.places().value_scales.end
    }

    /// Keys of part `index`.
    fn span(&self, index: usize) -> Range<usize> {
        index * KEYS..((index + 1) * KEYS).min(self.columns)
    }

    fn tiles(&self, rows: usize) -> Tiles {
        Tiles::new(rows, self.isa.float_shape().rows)
    }

    /// Rounds a head's keys and values.
    pub fn pack(&self, k: Heads<'_>, v: Heads<'_>, head: usize, packed: &mut [u32]) {
        GATHERED.with_borrow_mut(|gathered| {
            let mut mean = std::mem::take(&mut gathered.mean);
            mean.clear();
            mean.resize(self.size, 0.0);
            for key in 0..self.columns {
                ahead(k, head, key, self.columns);
                mean.iter_mut().zip(k.row(head, key)).for_each(|(sum, x)| *sum += x);
            }
            mean.iter_mut().for_each(|sum| *sum /= self.columns as f32);
            let length = self.places().value_scales.end;
            for (index, part) in packed.chunks_exact_mut(length).enumerate() {
                self.pack_keys(k, (head, self.span(index)), &mean, part, gathered);
                self.pack_values(v, (head, self.span(index)), part, gathered);
            }
            gathered.mean = mean;
        });
    }

    fn pack_keys(
        &self,
        k: Heads<'_>,
        (head, span): (usize, Range<usize>),
        mean: &[f32],
        part: &mut [u32],
        Gathered { floats, words, .. }: &mut Gathered,
    ) {
        let (places, tiles) = (self.places(), self.tiles(span.len()));
        floats.clear();
        floats.resize(self.filled(), 0.0);
        words.resize(TILE_ROWS * self.words(), 0);
        for tile in 0..tiles.count {
            let (first, height) = (tiles.start(tile), tiles.height(tile));
            for (r, words) in words.chunks_exact_mut(self.words()).enumerate().take(height) {
                let row = k.row(head, span.start + first + r).iter().zip(mean);
                floats.iter_mut().zip(row).for_each(|(to, (x, mean))| *to = x - mean);
                let [start, scale] = self.round(floats, words);
                part[places.starts.start + first + r] = start;
                part[places.key_scales.start + first + r] = scale;
            }
            let rows = words.chunks_exact(self.words()).take(height);
            let tile = &mut part[places.keys.clone()][first * self.words()..];
            self.isa.interleave(Interleave::new(rows, height, tile));
        }
    }

    fn pack_values(
        &self,
        v: Heads<'_>,
        (head, span): (usize, Range<usize>),
        part: &mut [u32],
        Gathered { floats, words, .. }: &mut Gathered,
    ) {
        let (places, group) = (self.places(), self.isa.group());
        let filled = span.len().next_multiple_of(BLOCK);
        // Each column's values of all keys one after the other.
        floats.clear();
        floats.resize(self.size * filled, 0.0);
        for first in span.clone().step_by(TILE_ROWS) {
            let height = TILE_ROWS.min(span.end - first);
            let rows = (first..first + height).map(|key| {
                ahead(v, head, key, span.end);
                v.row(head, key)
            });
            let tile = &mut floats[first - span.start..];
            self.isa.interleave(Interleave::new(rows, filled, tile));
        }
        let (count, tiles) = (span.len().div_ceil(group), self.tiles(self.size));
        words.resize(TILE_ROWS * filled / group, 0);
        for tile in 0..tiles.count {
            let (first, height) = (tiles.start(tile), tiles.height(tile));
            let columns = floats[first * filled..].chunks_exact(filled).take(height);
            for (r, (column, words)) in
                columns.zip(words.chunks_exact_mut(filled / group)).enumerate()
            {
                let [_, scale] = self.round(column, words);
                part[places.value_scales.start + first + r] = scale;
            }
            let rows = words.chunks_exact(filled / group).take(height).map(|row| &row[..count]);
            let tile = &mut part[places.values.clone()][first * count..];
            self.isa.interleave(Interleave::new(rows, height, tile));
        }
    }

    /// `x`, whole blocks, with one scale: where its sums start, and the scale, which is no number where a value is none.
    fn round(&self, x: &[f32], words: &mut [u32]) -> [u32; 2] {
        let (mut start, mut scale) = ([0], [0]);
        self.isa.round(Rounding {
            x,
            block: x.len(),
            group: self.isa.group(),
            offset: i32::from(self.isa.other_side()),
            words,
            starts: &mut start,
            scales: &mut scale,
        });
        let scale = f32::from_bits(scale[0]);
        [start[0], if scale.is_finite() { scale } else { f32::NAN }.to_bits()]
    }

    /// The queries of a block side by side, `[word][query]`, and their scales, by which scores become those of a softmax
    /// base 2.
    fn pack_queries(
        &self,
        q: Heads<'_>,
        (head, span): (usize, Range<usize>),
        queries: &mut [u32],
        scales: &mut [f32],
    ) {
        let width = scales.len();
        if span.len() < width {
            queries.fill(0);
        }
        let by = (self.size as f32).powf(-0.5) * std::f32::consts::LOG2_E;
        GATHERED.with_borrow_mut(|Gathered { floats, words, .. }| {
            floats.clear();
            floats.resize(self.filled(), 0.0);
            words.resize(TILE_ROWS * self.words(), 0);
            for first in (0..span.len()).step_by(TILE_ROWS) {
                let height = TILE_ROWS.min(span.len() - first);
                for (r, words) in words.chunks_exact_mut(self.words()).enumerate().take(height) {
                    let row = span.start + first + r;
                    ahead(q, head, row, span.end);
                    floats[..self.size].copy_from_slice(q.row(head, row));
                    let [_, scale] = self.round(floats, words);
                    scales[first + r] = f32::from_bits(scale) * by;
                }
                let rows = words.chunks_exact(self.words()).take(height);
                self.isa.interleave(Interleave::new(rows, width, &mut queries[first..]));
            }
        });
        if self.isa.other_side() != 0 {
            // Added to each byte of a word: without a carry that turns its highest bit.
            queries.iter_mut().for_each(|word| *word ^= 0x8080_8080);
        }
    }
}

/// Asks for the row that will be read when some more were, of those before `end`: rows of one head lie far apart.
fn ahead(of: Heads<'_>, head: usize, row: usize, end: usize) {
    if row + TILE_ROWS < end {
        prefetch(of.row(head, row + TILE_ROWS));
    }
}

impl Block<'_> {
    pub fn run(&self, cell: Cell<'_>, scratch: &mut Scratch) {
        let Self { plan, packed, .. } = *self;
        let Plan { isa, size, .. } = plan;
        let (lanes, group) = (isa.float_shape().lanes, isa.group());
        let width = cell.rows().len().next_multiple_of(lanes);
        let vectors = width / lanes;
        scratch.floats.grow((2 * size + KEYS) * width);
        scratch.words.grow((plan.words() + KEYS / group) * width);
        let (sums, rest) = scratch.floats.split_at_mut(size * width);
        let (turned, scores) = rest.split_at_mut(size * width);
        let (queries, weights) = scratch.words.split_at_mut(plan.words() * width);
        let mut by = [0.0; TILE_COLUMNS];
        plan.pack_queries(self.q, (cell.along, cell.rows()), queries, &mut by[..width]);
        let (places, values) = (plan.places(), plan.tiles(size));
        let mut columns = Columns::new(&cell, self.sizes);
        let mut scales = [0.0; TILE_COLUMNS];
        for (index, part) in packed.chunks_exact(places.value_scales.end).enumerate() {
            let span = plan.span(index);
            if span.start >= columns.most {
                break;
            }
            let keys = plan.tiles(span.len());
            let (starts, key_scales) =
                (&part[places.starts.clone()], &part[places.key_scales.clone()]);
            for tile in 0..keys.count {
                let (start, rows) = (keys.start(tile), keys.height(tile));
                isa.word_tile(Words {
                    count: plan.words(),
                    a: &part[places.keys.clone()][start * plan.words()..],
                    starts: &starts[start..],
                    a_scales: &key_scales[start..],
                    b: queries,
                    b_step: width,
                    b_scales: &by,
                    rows,
                    vectors,
                    out: &mut scores[start * width..],
                    accumulate: false,
                });
            }
            // A word holds whole groups of keys: those past the last are not seen.
            let count = span.len().div_ceil(group);
            let scores = &mut scores[..count * group * width];
            scores[span.len() * width..].fill(f32::NEG_INFINITY);
            columns.hide(scores, width, span.start, f32::NEG_INFINITY);
            isa.weigh(Weigh {
                scores,
                vectors,
                words: weights,
                largest: &mut columns.largest,
                sums: &mut columns.sums,
                shrink: &mut columns.shrink,
                scales: &mut scales,
            });
            if index > 0 {
                columns.shrink(isa, sums, width);
            }
            let value_scales = &part[places.value_scales.clone()];
            for tile in 0..values.count {
                let (start, rows) = (values.start(tile), values.height(tile));
                isa.word_tile(Words {
                    count,
                    a: &part[places.values.clone()][start * count..],
                    starts: &[0; TILE_ROWS],
                    a_scales: &value_scales[start..],
                    b: weights,
                    b_step: width,
                    b_scales: &scales,
                    rows,
                    vectors,
                    out: &mut sums[start * width..],
                    accumulate: index > 0,
                });
            }
        }
        columns.finish(isa, cell, sums, turned);
    }
}
