//! The innermost loops, one per instruction set: the only code here that speaks to the processor directly.
//!
//! A *tile* is a few rows of the result by a few vectors of columns, held in registers while the products of a whole
//! depth are added to it. Everything above (blocking, threads, epilogues) is safe code that calls
//! [`Isa::multiply_tile`] and its kin, which check their slices once.

#![allow(unsafe_code)]

mod aligned;
mod interleave;
#[cfg(target_arch = "aarch64")]
mod neon;
mod operands;
mod portable;
mod round;
mod softmax;
mod square;
mod tile;
mod words;
#[cfg(target_arch = "x86_64")]
mod x86;

pub use aligned::{Aligned, Plain};
pub use interleave::Interleave;
pub use operands::{Dots, Piece, Products, Quants, Weights, Widening};
pub use round::{Rounding, round};
pub use softmax::Softmax;
pub use square::{Back, Forth, PLACES, SIDE};
pub use words::{Weigh, Words};

use super::isa::Isa;

/// Values of one quantisation block.
pub const BLOCK: usize = 32;
/// Activations with one scale, where a column of weights has one for all its depths ([`Quants::Columns`]).
pub const SPAN: usize = 64;
/// Values of the blocks that share their factors ([`Quants::Minima`]).
pub const SUPER_BLOCK: usize = 256;
/// The blocks in them.
pub const SUPER_BLOCKS: usize = SUPER_BLOCK / BLOCK;

/// The most rows of a tile.
pub const TILE_ROWS: usize = 8;
/// Floats of a cache line.
pub const LINE: usize = 16;

/// The most columns of a tile.
pub const TILE_COLUMNS: usize = 48;

/// Asks for the lines of `values`, which will be read or written soon: a store to a line that is far away blocks those
/// behind it.
pub fn prefetch(values: &[f32]) {
    values.chunks(LINE).for_each(|line| tile::prefetch(line.as_ptr()));
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
            Self::NeonDot => Shape { lanes: 4, rows: 8, vectors: 3 },
            Self::Avx2 | Self::AvxVnni => Shape { lanes: 8, rows: 6, vectors: 2 },
            Self::Avx512 | Self::Avx512Vnni => Shape { lanes: 16, rows: 8, vectors: 3 },
        }
    }

    /// Tiles of 8-bit products.
    pub fn dot_shape(self) -> Shape {
        match self {
            Self::Portable | Self::NeonDot => Shape { lanes: 4, rows: 6, vectors: 2 },
            Self::Avx2 | Self::AvxVnni => Shape { lanes: 8, rows: 6, vectors: 2 },
            Self::Avx512 | Self::Avx512Vnni => Shape { lanes: 16, rows: 7, vectors: 2 },
        }
    }

    /// Depth that one word of quantised activations covers: four 8-bit values, or two widened to 16 bits where the
    /// processor has no 8-bit dot product.
    pub fn group(self) -> usize {
        match self {
            Self::Portable | Self::Avx2 | Self::Avx512 => 2,
            Self::NeonDot | Self::AvxVnni | Self::Avx512Vnni => 4,
        }
    }

    /// `out[r][c] (+)= Σ_k a[k][r]·b[k][c]`; see [`Products`].
    ///
    /// # Panics
    /// When a slice is too short for the sizes, which only a bug above can cause.
    #[inline]
    pub fn multiply_tile(self, mut p: Products<'_>) {
        p.check(self.float_shape());
        // By reference: to move the operands costs as much as some of the smaller tiles.
        let p = &mut p;
        // SAFETY: the slices hold what the sizes say (checked above), and `self` is available: weights are packed
        // for sets that `Isa::available` confirmed only.
        unsafe {
            match self {
                #[cfg(target_arch = "x86_64")]
                Self::Avx512 | Self::Avx512Vnni => x86::multiply_avx512(p),
                #[cfg(target_arch = "x86_64")]
                Self::Avx2 | Self::AvxVnni => x86::multiply_avx2(p),
                #[cfg(target_arch = "aarch64")]
                Self::NeonDot => neon::multiply(p),
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
                #[cfg(target_arch = "aarch64")]
                Self::NeonDot => neon::dot(d),
                _ => portable::dot(d),
            }
        }
    }

    /// Rows side by side; see [`Interleave`].
    ///
    /// # Panics
    /// As [`Self::multiply_tile`].
    pub fn interleave<T: Plain>(self, i: Interleave<'_, T>) {
        i.check();
        match self {
            // SAFETY: as in `multiply_tile`.
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 | Self::AvxVnni | Self::Avx512 | Self::Avx512Vnni => unsafe {
                interleave::eights(i);
            },
            _ => interleave::Twin(i).run(),
        }
    }

    /// Rounds a row to 8 bits; see [`Rounding`].
    ///
    /// # Panics
    /// As [`Self::multiply_tile`].
    pub fn round(self, r: Rounding<'_>) {
        r.check();
        match self {
            // SAFETY: as in `multiply_tile`.
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 | Self::Avx512Vnni => unsafe {
                round::sixteens(r);
            },
            // SAFETY: as in `multiply_tile`.
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 | Self::AvxVnni => unsafe {
                round::eights(r);
            },
            _ => round::twin(r),
        }
    }

    /// Takes some more keys into a softmax; see [`Softmax`].
    ///
    /// # Panics
    /// As [`Self::multiply_tile`].
    pub fn softmax_step(self, s: Softmax<'_>) {
        s.check(self.float_shape());
        // SAFETY: as in `multiply_tile`.
        unsafe {
            match self {
                #[cfg(target_arch = "x86_64")]
                Self::Avx512 | Self::Avx512Vnni => x86::softmax_avx512(s),
                #[cfg(target_arch = "x86_64")]
                Self::Avx2 | Self::AvxVnni => x86::softmax_avx2(s),
                #[cfg(target_arch = "aarch64")]
                Self::NeonDot => neon::softmax(s),
                _ => portable::softmax(s),
            }
        }
    }

    /// What is added to each rounded value that becomes a columns' side of [`Words`].
    pub fn other_side(self) -> u8 {
        match self {
            Self::AvxVnni | Self::Avx512Vnni => 128,
            _ => 0,
        }
    }

    /// `out[r][c] (+)= a_scale[r]·b_scale[c]·Σ_k a[k][r]·b[k][c]`; see [`Words`].
    ///
    /// # Panics
    /// As [`Self::multiply_tile`].
    #[inline]
    pub fn word_tile(self, mut w: Words<'_>) {
        w.check(self.float_shape());
        let w = &mut w;
        // SAFETY: as in `multiply_tile`.
        unsafe {
            match self {
                #[cfg(target_arch = "x86_64")]
                Self::Avx512Vnni => x86::words_avx512_vnni(w),
                #[cfg(target_arch = "x86_64")]
                Self::Avx512 => x86::words_avx512(w),
                #[cfg(target_arch = "x86_64")]
                Self::AvxVnni => x86::words_avx_vnni(w),
                #[cfg(target_arch = "x86_64")]
                Self::Avx2 => x86::words_avx2(w),
                #[cfg(target_arch = "aarch64")]
                Self::NeonDot => neon::words(w),
                _ => portable::words(w),
            }
        }
    }

    /// Takes some more keys into a softmax and rounds what they become; see [`Weigh`].
    ///
    /// # Panics
    /// As [`Self::multiply_tile`].
    pub fn weigh(self, w: Weigh<'_>) {
        w.check(self.float_shape(), self.group());
        // SAFETY: as in `multiply_tile`.
        unsafe {
            match self {
                #[cfg(target_arch = "x86_64")]
                Self::Avx512Vnni => x86::weigh_avx512_vnni(w),
                #[cfg(target_arch = "x86_64")]
                Self::Avx512 => x86::weigh_avx512(w),
                #[cfg(target_arch = "x86_64")]
                Self::AvxVnni => x86::weigh_avx_vnni(w),
                #[cfg(target_arch = "x86_64")]
                Self::Avx2 => x86::weigh_avx2(w),
                #[cfg(target_arch = "aarch64")]
                Self::NeonDot => neon::weigh(w),
                _ => portable::weigh(w),
            }
        }
    }

    /// Transforms a square of places; see [`Forth`].
    ///
    /// # Panics
    /// As [`Self::multiply_tile`].
    pub fn square_forth(self, f: Forth<'_>) {
        f.check(self.float_shape());
        // SAFETY: as in `multiply_tile`.
        unsafe {
            match self {
                #[cfg(target_arch = "x86_64")]
                Self::Avx512 | Self::Avx512Vnni => x86::forth_avx512(f),
                #[cfg(target_arch = "x86_64")]
                Self::Avx2 | Self::AvxVnni => x86::forth_avx2(f),
                #[cfg(target_arch = "aarch64")]
                Self::NeonDot => neon::forth(f),
                _ => portable::forth(f),
            }
        }
    }

    /// Transforms sums back; see [`Back`].
    ///
    /// # Panics
    /// As [`Self::multiply_tile`].
    pub fn square_back(self, b: Back<'_>) {
        b.check(self.float_shape());
        // SAFETY: as in `multiply_tile`.
        unsafe {
            match self {
                #[cfg(target_arch = "x86_64")]
                Self::Avx512 | Self::Avx512Vnni => x86::back_avx512(b),
                #[cfg(target_arch = "x86_64")]
                Self::Avx2 | Self::AvxVnni => x86::back_avx2(b),
                #[cfg(target_arch = "aarch64")]
                Self::NeonDot => neon::back(b),
                _ => portable::back(b),
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
                #[cfg(target_arch = "aarch64")]
                Self::NeonDot => neon::widen(w),
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
