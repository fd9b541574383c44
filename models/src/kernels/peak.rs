//! How fast this machine multiplies at best, measured: what products are compared with.

use std::time::Instant;

use super::isa::Isa;
use super::pool::pool;
use super::simd::{Piece, Products, TILE_COLUMNS, TILE_ROWS};

/// Depth of the tile that is multiplied again and again: small enough for the first-level cache.
const DEPTH: usize = 128;
/// Tiles in one measurement, some tens of microseconds.
const TILES: usize = 200;

/// Multiplications with an addition a second, in 32-bit floats on all threads of the pool: whole tiles whose operands
/// never leave the first-level cache. The best of `rounds` short measurements, since what disturbs one only slows it.
pub fn floats(rounds: usize) -> f64 {
    let isa = Isa::current();
    let shape = isa.float_shape();
    let columns = shape.lanes * shape.vectors;
    let (a, b) = (vec![1.0; DEPTH * shape.rows], vec![1.0; DEPTH * columns]);
    let threads = pool().threads();
    let products = (TILES * DEPTH * shape.rows * columns * threads) as f64;
    let mut best = 0f64;
    for _ in 0..rounds.max(1) {
        let start = Instant::now();
        // More units than threads, so that one that comes late takes fewer.
        pool().run(threads * 4, |_| {
            let mut out = [0.0; TILE_ROWS * TILE_COLUMNS];
            for _ in 0..TILES / 4 {
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
                });
            }
            std::hint::black_box(out);
        });
        best = best.max(products / start.elapsed().as_secs_f64());
    }
    best
}
