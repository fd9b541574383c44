//! Which instructions the kernels may use, found out when they are first asked for.

use std::sync::atomic::{AtomicU8, Ordering};

/// An instruction set that kernels exist for, in order of preference.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Isa {
    /// What every processor of the target has (on aarch64 that includes NEON).
    Portable,
    /// aarch64 with 8-bit dot products (ARMv8.2 `dotprod`).
    NeonDot,
    /// x86-64 with AVX2, FMA and F16C.
    Avx2,
    /// The same, with 8-bit dot products on 256-bit vectors (AVX-VNNI).
    AvxVnni,
    /// AVX-512 F, BW, DQ, VL.
    Avx512,
    /// The same, with 8-bit dot products (AVX-512 VNNI).
    Avx512Vnni,
}

/// The set in use plus one; 0: not yet found out.
static CURRENT: AtomicU8 = AtomicU8::new(0);

impl Isa {
    /// All of them, from the plainest on.
    pub const ALL: [Self; 6] =
        [Self::Portable, Self::NeonDot, Self::Avx2, Self::AvxVnni, Self::Avx512, Self::Avx512Vnni];

    /// Name as options and reports write it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            Self::NeonDot => "neon-dotprod",
            Self::Avx2 => "avx2",
            Self::AvxVnni => "avx-vnni",
            Self::Avx512 => "avx512",
            Self::Avx512Vnni => "avx512-vnni",
        }
    }

    /// The set called `name`.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|isa| isa.name() == name)
    }

    /// True when this processor has it.
    #[cfg(target_arch = "x86_64")]
    pub fn available(self) -> bool {
        let avx2 = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c");
        let avx512 = avx2
            && is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl");
        match self {
            Self::Portable => true,
            Self::NeonDot => false,
            Self::Avx2 => avx2,
            Self::AvxVnni => avx2 && is_x86_feature_detected!("avxvnni"),
            Self::Avx512 => avx512,
            Self::Avx512Vnni => avx512 && is_x86_feature_detected!("avx512vnni"),
        }
    }

    /// True when this processor has it.
    #[cfg(target_arch = "aarch64")]
    pub fn available(self) -> bool {
        match self {
            Self::Portable => true,
            Self::NeonDot => std::arch::is_aarch64_feature_detected!("dotprod"),
            _ => false,
        }
    }

    /// True when this processor has it.
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    pub fn available(self) -> bool {
        self == Self::Portable
    }

    /// The best set of this processor.
    pub fn best() -> Self {
        Self::ALL.into_iter().rev().find(|isa| isa.available()).unwrap_or(Self::Portable)
    }

    /// The set that weights are packed for from now on.
    pub fn current() -> Self {
        match Self::ALL.get(usize::from(CURRENT.load(Ordering::Relaxed)).wrapping_sub(1)) {
            Some(isa) => *isa,
            None => Self::best(),
        }
    }

    /// Packs weights for `self` from now on, so that sets can be compared on one machine. Weights that are packed
    /// already keep theirs.
    ///
    /// Returns false, changing nothing, when this processor lacks it.
    pub fn choose(self) -> bool {
        let available = self.available();
        if available {
            CURRENT.store(self as u8 + 1, Ordering::Relaxed);
        }
        available
    }
}

#[cfg(test)]
mod tests {
    use super::Isa;

    #[test]
    fn names_are_read_back_and_the_portable_set_is_everywhere() {
        for isa in Isa::ALL {
            assert_eq!(Isa::from_name(isa.name()), Some(isa));
        }
        assert!(Isa::Portable.available() && Isa::best().available());
    }
}
