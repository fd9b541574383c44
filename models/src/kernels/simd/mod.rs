//! The innermost loops, one per instruction set: the only code here that speaks to the processor directly.
//!
//! A *tile* is a few rows of the result by a few vectors of columns, held in registers while the products of a whole
//! depth are added to it. Everything above (blocking, threads, epilogues) is safe code that calls
//! [`Isa::multiply_tile`], [`Isa::dot_tile`], [`Isa::widen_panel`] and [`Isa::run`], which check their slices once.

#![allow(unsafe_code)]

mod aligned;
mod portable;
mod tile;
#[cfg(target_arch = "x86_64")]
mod x86;

pub use aligned::{Aligned, Plain};
pub use tile::{Dots, Products, Quants, Widening};

use super::isa::Isa;

/// Values of one quantisation block.
pub const BLOCK: usize = 32;

/// The most rows of a tile.
pub const TILE_ROWS: usize = 8;
/// The most columns of a tile.
pub const TILE_COLUMNS: usize = 48;

/// Asks for the lines of `values`, which will be written soon: a store to a line that is far away blocks those behind
/// it.
pub fn prefetch(values: &[f32]) {
    values.chunks(16).for_each(|line| tile::prefetch(line.as_ptr()));
}

/// A loop that is compiled once for each instruction set; its body must be `#[inline(always)]`.
pub trait Loop {
    /// What it gives.
    type Output;
    /// The loop.
    fn run(self) -> Self::Output;
}

/// Sizes of the tiles of an instruction set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Values in a vector.
    pub lanes: usize,
    /// Most rows of a tile.
    pub rows: usize,
    /// Most vectors of columns of a tile.
    pub vectors: usize,
}

impl Isa {
    /// Tiles of 32-bit floats.
    pub fn float_shape(self) -> Shape {
        match self {
            Self::Portable => Shape { lanes: 4, rows: 6, vectors: 3 },
            Self::Avx2 | Self::AvxVnni => Shape { lanes: 8, rows: 6, vectors: 2 },
            Self::Avx512 | Self::Avx512Vnni => Shape { lanes: 16, rows: 8, vectors: 3 },
        }
    }

    /// Tiles of 8-bit products.
    pub fn dot_shape(self) -> Shape {
        match self {
            Self::Portable => Shape { lanes: 4, rows: 6, vectors: 2 },
            Self::Avx2 | Self::AvxVnni => Shape { lanes: 8, rows: 6, vectors: 2 },
            Self::Avx512 | Self::Avx512Vnni => Shape { lanes: 16, rows: 7, vectors: 2 },
        }
    }

    /// Depth that one word of quantised activations covers: four 8-bit values, or two widened to 16 bits where the
    /// processor has no 8-bit dot product.
    pub fn group(self) -> usize {
        match self {
            Self::Portable | Self::Avx2 | Self::Avx512 => 2,
            Self::AvxVnni | Self::Avx512Vnni => 4,
        }
    }

    /// `out[r][c] (+)= Σ_k a[k][r]·b[k][c]`; see [`Products`].
    ///
    /// # Panics
    /// When a slice is too short for the sizes, which only a bug above can cause.
    pub fn multiply_tile(self, p: Products<'_>) {
        p.check(self.float_shape());
        // SAFETY: the slices hold what the sizes say (checked above), and `self` is available: weights are packed
        // for sets that `Isa::available` confirmed only.
        unsafe {
            match self {
                #[cfg(target_arch = "x86_64")]
                Self::Avx512 | Self::Avx512Vnni => x86::multiply_avx512(p),
                #[cfg(target_arch = "x86_64")]
                Self::Avx2 | Self::AvxVnni => x86::multiply_avx2(p),
                _ => portable::multiply(p),
            }
        }
    }

    /// `out[r][c] (+)= Σ_blocks a_scale[r]·b_scale[c]·Σ_k a[k][r]·b[k][c]`; see [`Dots`].
    ///
    /// # Panics
    /// As [`Self::multiply_tile`].
    pub fn dot_tile(self, d: Dots<'_>) {
        d.check(self.dot_shape(), self.group());
        // SAFETY: as in `multiply_tile`.
        unsafe {
            match self {
                #[cfg(target_arch = "x86_64")]
                Self::Avx512Vnni => x86::dot_avx512_vnni(d),
                #[cfg(target_arch = "x86_64")]
                Self::Avx512 => x86::dot_avx512(d),
                #[cfg(target_arch = "x86_64")]
                Self::AvxVnni => x86::dot_avx_vnni(d),
                #[cfg(target_arch = "x86_64")]
                Self::Avx2 => x86::dot_avx2(d),
                _ => portable::dot(d),
            }
        }
    }

    /// Quantised weights of a panel as floats, `out[k][c]`; see [`Widening`].
    ///
    /// # Panics
    /// As [`Self::multiply_tile`].
    pub fn widen_panel(self, w: Widening<'_>) {
        w.check(self.dot_shape());
        // SAFETY: as in `multiply_tile`.
        unsafe {
            match self {
                #[cfg(target_arch = "x86_64")]
                Self::Avx512Vnni => x86::widen_avx512_vnni(w),
                #[cfg(target_arch = "x86_64")]
                Self::Avx512 => x86::widen_avx512(w),
                #[cfg(target_arch = "x86_64")]
                Self::AvxVnni => x86::widen_avx_vnni(w),
                #[cfg(target_arch = "x86_64")]
                Self::Avx2 => x86::widen_avx2(w),
                _ => portable::widen(w),
            }
        }
    }

    /// Runs `body` compiled for this set.
    pub fn run<L: Loop>(self, body: L) -> L::Output {
        match self {
            // SAFETY: `self` is available, as in `multiply_tile`; the body is safe code.
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 | Self::Avx512Vnni => unsafe { x86::run_avx512(body) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 | Self::AvxVnni => unsafe { x86::run_avx2(body) },
            _ => body.run(),
        }
    }
}
