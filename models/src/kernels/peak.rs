//! How fast this machine multiplies at best, measured: what products are compared with.

use std::time::{Duration, Instant};

use super::isa::Isa;
use super::pool::pool;
use super::simd::{Piece, Products, TILE_COLUMNS, TILE_ROWS};

/// Depth of the tile that is multiplied again and again: small enough for the first-level cache.
const DEPTH: usize = 128;
/// Tiles of a thread in one short measurement, about a hundred microseconds.
const TILES: usize = 200;

/// Multiplications with an addition a second, in 32-bit floats on all threads of the pool: whole tiles whose operands
/// never leave the first-level cache. The best of `rounds` short measurements, since what disturbs one only slows it.
pub fn floats(rounds: usize) -> f64 {
    (0..rounds.max(1)).map(|_| burst(TILES)).map(|work| work.rate()).fold(0.0, f64::max)
}

/// The same for about `time`, one tile after the other, with all that disturbs: what the machine gives meanwhile. A
/// machine whose cores are shared, or get warm, gives less than in its best moment.
pub fn held(time: Duration) -> Held {
    let start = Instant::now();
    let mut all = Held::default();
    loop {
        all += burst(10 * TILES);
        if start.elapsed() >= time {
            return all;
        }
    }
}

/// Products and how long they took.
#[derive(Debug, Clone, Copy, Default)]
pub struct Held {
    /// Multiplications with an addition.
    pub products: f64,
    /// Seconds.
    pub seconds: f64,
}

impl Held {
    /// Products a second.
    pub fn rate(&self) -> f64 {
        self.products / self.seconds
    }
}

impl std::ops::AddAssign for Held {
    fn add_assign(&mut self, other: Self) {
        self.products += other.products;
        self.seconds += other.seconds;
    }
}

/// `tiles` tiles on each thread.
fn burst(tiles: usize) -> Held {
    let isa = Isa::current();
    let shape = isa.float_shape();
    let columns = shape.lanes * shape.vectors;
    let (a, b) = (vec![1.0; DEPTH * shape.rows], vec![1.0; DEPTH * columns]);
    let threads = pool().threads();
    let start = Instant::now();
    // More units than threads, so that one that comes late takes fewer.
    pool().run(threads * 4, |_| {
        let mut out = [0.0; TILE_ROWS * TILE_COLUMNS];
        for _ in 0..tiles / 4 {
            isa.multiply_tile(Products {
                pieces: &[Piece::whole(DEPTH)],
                a: &a,
                a_step: shape.rows,
                b: &b,
                b_step: columns,
                rows: shape.rows,
                vectors: shape.vectors,
                out: &mut out,
                accumulate: false,
                ahead: &[],
            });
        }
        std::hint::black_box(out);
    });
    Held {
        products: (tiles * DEPTH * shape.rows * columns * threads) as f64,
        seconds: start.elapsed().as_secs_f64(),
    }
}
