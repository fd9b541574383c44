//! FAST action tokens: a byte-level BPE over the cosine transform of a chunk.
//!
//! Encoding took the orthonormal DCT-II of the normalised chunk along time, times `scale`, rounded; laid the
//! coefficients out frequency by frequency; wrote each, minus `min_token`, as one Unicode code point; and cut
//! the UTF-8 text into byte-level BPE tokens. Here is the way back. Source: FAST (arXiv 2501.09747); LeRobot
//! 0.6.1 `src/lerobot/policies/pi0_fast/modeling_pi0_fast.py`, `decode_actions_with_fast`. Unlike there, bytes
//! are read strictly: a replacement character would be a coefficient of thousands.

use std::collections::HashMap;
use std::f64::consts::PI;
use std::path::Path;

use serde::Deserialize;
use tokenizers::Tokenizer;

use crate::ModelError;

/// No normalised action is larger; a coefficient that only such an action has is refused.
const LARGEST_ACTION: f64 = 100.0;
/// No published action vocabulary comes near.
const MOST_TOKENS: usize = 1 << 20;

/// `processor_config.json` of an action tokenizer.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
struct Settings {
    scale: f64,
    min_token: i32,
}

/// An action tokenizer, for decoding.
#[derive(Debug, Clone)]
pub struct FastTokenizer {
    /// Bytes of each token.
    tokens: Vec<Vec<u8>>,
    scale: f64,
    min_token: i32,
}

/// The character that stands for `byte` in byte-level BPE (GPT-2's `bytes_to_unicode`).
pub(crate) fn byte_character(byte: u8) -> char {
    let printable = |b: u8| matches!(b, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    if printable(byte) {
        return char::from(byte);
    }
    let before = (0..byte).filter(|b| !printable(*b)).count() as u32;
    char::from_u32(256 + before).unwrap_or(' ')
}

impl FastTokenizer {
    /// The tokenizer in `json` (a `tokenizer.json`) with `settings` (its `processor_config.json`); the paths are
    /// for messages.
    ///
    /// # Errors
    /// [`ModelError::Tokenizer`], [`ModelError::Config`] naming what cannot be used.
    pub fn new(
        (path, json): (&Path, &str),
        (settings_path, settings): (&Path, &str),
    ) -> Result<Self, ModelError> {
        let settings: Settings = serde_json::from_str(settings).map_err(|e| {
            ModelError::config(settings_path, "the file", format!("cannot be read: {e}"))
        })?;
        if !(settings.scale > 0.0 && settings.scale.is_finite()) {
            let reason = format!("is {}, expected a number above 0", settings.scale);
            return Err(ModelError::config(settings_path, "scale", reason));
        }
        let fail = |reason: String| ModelError::Tokenizer { path: path.to_owned(), reason };
        let tokenizer = Tokenizer::from_bytes(json)
            .map_err(|e| fail(format!("is no tokenizer.json that can be read: {e}")))?;
        let alphabet: HashMap<char, u8> = (0..=255).map(|b| (byte_character(b), b)).collect();
        let count = tokenizer.get_vocab_size(true);
        if count == 0 || count > MOST_TOKENS {
            return Err(fail(format!("has {count} tokens, expected 1 to {MOST_TOKENS}")));
        }
        let tokens = (0..count)
            .map(|id| {
                let text = u32::try_from(id).ok().and_then(|id| tokenizer.id_to_token(id));
                let text = text.ok_or_else(|| fail(format!("has {count} tokens, but no {id}")))?;
                let bytes: Option<Vec<u8>> =
                    text.chars().map(|c| alphabet.get(&c).copied()).collect();
                // Entries that were never merged stand for themselves.
                Ok(bytes.unwrap_or_else(|| text.into_bytes()))
            })
            .collect::<Result<_, ModelError>>()?;
        Ok(Self { tokens, scale: settings.scale, min_token: settings.min_token })
    }

    /// Number of action tokens.
    pub fn vocabulary(&self) -> usize {
        self.tokens.len()
    }

    /// Nothing decoded yet of a chunk of `horizon` actions of `dim` values.
    pub fn begin(&self, horizon: usize, dim: usize) -> Coefficients {
        let most = LARGEST_ACTION * self.scale * (horizon as f64).sqrt();
        Coefficients {
            values: Vec::new(),
            partial: Vec::new(),
            wanted: horizon * dim,
            last: (most - f64::from(self.min_token)).clamp(0.0, f64::from(u32::MAX)) as u32,
            min_token: self.min_token,
        }
    }

    /// Whether action token `id` can come next.
    pub fn fits(&self, so_far: &Coefficients, id: usize) -> bool {
        self.tokens.get(id).is_some_and(|bytes| so_far.read(bytes).is_some())
    }

    /// Appends action token `id`; false, and nothing changed, when it cannot come next.
    pub fn push(&self, so_far: &mut Coefficients, id: usize) -> bool {
        let Some((values, partial)) = self.tokens.get(id).and_then(|bytes| so_far.read(bytes))
        else {
            return false;
        };
        so_far.values.extend(values);
        so_far.partial = partial;
        true
    }

    /// The normalised chunk of `coefficients`, rows of `dim`: the inverse cosine transform along time.
    /// What is missing at the end, the highest frequencies, is zero.
    pub fn actions(&self, coefficients: &Coefficients, dim: usize) -> Vec<f32> {
        let values: Vec<f64> =
            coefficients.values.iter().map(|c| f64::from(*c) / self.scale).collect();
        inverse_dct(&values, coefficients.wanted / dim.max(1), dim)
    }
}

/// The orthonormal DCT-III of each column: `coefficients` frequency by frequency, rows of `dim`; the result has
/// `horizon` rows.
pub fn inverse_dct(coefficients: &[f64], horizon: usize, dim: usize) -> Vec<f32> {
    let mut out = vec![0.0; horizon * dim];
    for (n, row) in out.chunks_exact_mut(dim.max(1)).enumerate() {
        let mut sums = vec![0f64; dim];
        for (k, frequency) in coefficients.chunks(dim.max(1)).take(horizon).enumerate() {
            let size = if k == 0 { 1.0 } else { 2.0 };
            let angle = PI * ((2 * n + 1) * k) as f64 / (2 * horizon) as f64;
            let wave = (size / horizon as f64).sqrt() * angle.cos();
            sums.iter_mut().zip(frequency).for_each(|(sum, c)| *sum += c * wave);
        }
        row.iter_mut().zip(sums).for_each(|(o, sum)| *o = sum as f32);
    }
    out
}

/// Coefficients decoded so far.
#[derive(Debug, Clone, PartialEq)]
pub struct Coefficients {
    values: Vec<i32>,
    /// Bytes of a character that has not ended.
    partial: Vec<u8>,
    wanted: usize,
    /// The largest code point that is a coefficient.
    last: u32,
    min_token: i32,
}

impl Coefficients {
    /// The coefficients, frequency by frequency.
    pub fn values(&self) -> &[i32] {
        &self.values
    }

    /// Whether the last character is whole, so that the chunk may end here.
    pub fn may_end(&self) -> bool {
        self.partial.is_empty() && !self.values.is_empty()
    }

    /// Whether nothing is missing.
    pub fn is_complete(&self) -> bool {
        self.values.len() >= self.wanted
    }

    /// What `bytes` add: coefficients, and the bytes of a character that has not ended. None when they are no
    /// UTF-8, too many, or out of range.
    fn read(&self, bytes: &[u8]) -> Option<(Vec<i32>, Vec<u8>)> {
        let all = [self.partial.as_slice(), bytes].concat();
        let (text, rest) = match std::str::from_utf8(&all) {
            Ok(text) => (text, &[][..]),
            Err(e) if e.error_len().is_none() => {
                let (whole, rest) = all.split_at(e.valid_up_to());
                (std::str::from_utf8(whole).ok()?, rest)
            }
            Err(_) => return None,
        };
        let values = text.chars().map(|c| {
            let point = u32::from(c);
            (point <= self.last).then_some(point as i32 + self.min_token)
        });
        let values: Vec<i32> = values.collect::<Option<_>>()?;
        let room = self.wanted.checked_sub(self.values.len() + values.len())?;
        let fits = rest.is_empty() || (room > 0 && lowest(rest) <= self.last);
        (fits && !bytes.is_empty()).then(|| (values, rest.to_vec()))
    }
}

/// The lowest code point whose UTF-8 begins with `partial`, or one below.
fn lowest(partial: &[u8]) -> u32 {
    let Some((first, rest)) = partial.split_first() else { return 0 };
    // Longer forms of what a shorter one can say are no UTF-8.
    let (start, length, least) = match first {
        0xF0..=0xFF => (u32::from(first & 0x07), 4, 0x1_0000),
        0xE0..=0xEF => (u32::from(first & 0x0F), 3, 0x800),
        _ => (u32::from(first & 0x1F), 2, 0x80),
    };
    let tail = rest.iter().copied().chain(std::iter::repeat(0)).take(length - 1);
    tail.fold(start, |point, byte| point << 6 | u32::from(byte & 0x3F)).max(least)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokenizer(tokens: &[&[u8]]) -> FastTokenizer {
        let tokens = tokens.iter().map(|t| t.to_vec()).collect();
        FastTokenizer { tokens, scale: 10.0, min_token: -354 }
    }

    #[test]
    fn the_inverse_transform_undoes_the_transform() {
        // The DCT-II written down directly.
        let (horizon, dim) = (7, 2);
        let actions: Vec<f64> = (0..horizon * dim).map(|i| ((i * i) as f64 * 0.37).sin()).collect();
        let coefficient = |k: usize, j: usize| -> f64 {
            let size = if k == 0 { 1.0 } else { 2.0 };
            let wave = |n: usize| (PI * k as f64 * (n as f64 + 0.5) / horizon as f64).cos();
            let sum: f64 = (0..horizon).map(|n| actions[n * dim + j] * wave(n)).sum();
            (size / horizon as f64).sqrt() * sum
        };
        let coefficients: Vec<f64> =
            (0..horizon * dim).map(|i| coefficient(i / dim, i % dim)).collect();
        let back = inverse_dct(&coefficients, horizon, dim);
        let worst = actions.iter().zip(&back).map(|(a, b)| (a - f64::from(*b)).abs());
        assert!(worst.fold(0.0, f64::max) < 1e-6);
        // Without the high frequencies each column keeps its mean.
        let smooth = inverse_dct(&coefficients[..dim], horizon, dim);
        let mean = (0..horizon).map(|n| actions[n * dim]).sum::<f64>() / horizon as f64;
        assert!(smooth.chunks(dim).all(|row| (f64::from(row[0]) - mean).abs() < 1e-6));
    }

    #[test]
    fn a_character_may_be_cut_between_two_tokens() {
        // 350 and 360 as code points (U+015E, U+0168) are −4 and 6.
        let text = "\u{15E}\u{168}".as_bytes();
        let t = tokenizer(&[&text[..1], &text[1..], text]);
        let mut so_far = t.begin(2, 1);
        assert!(!t.fits(&so_far, 1), "it begins inside a character");
        assert!(t.push(&mut so_far, 0) && !so_far.may_end());
        assert!(!t.fits(&so_far, 2) && !t.fits(&so_far, 0), "the character must go on");
        assert!(t.push(&mut so_far, 1) && so_far.may_end() && so_far.is_complete());
        assert_eq!(so_far.values(), [-4, 6]);
        assert!(!t.fits(&so_far, 0) && !t.fits(&so_far, 2) && !t.fits(&so_far, 9), "it is full");
        let actions = t.actions(&so_far, 1);
        // Frequencies −0.4 and 0.6: (−0.4 ± 0.6)/√2.
        let expected = [0.2 / 2f32.sqrt(), -1.0 / 2f32.sqrt()];
        assert!(actions.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-6), "{actions:?}");
    }

    #[test]
    fn coefficients_that_no_action_has_are_refused() {
        let t = tokenizer(&["\u{FFFD}".as_bytes(), &[0xF0], &[0xFF], &[0xC3], b""]);
        let so_far = t.begin(4, 1);
        assert!(!t.fits(&so_far, 0) && !t.fits(&so_far, 1) && !t.fits(&so_far, 2));
        assert!(t.fits(&so_far, 3), "the first byte of an ordinary character");
        assert!(!t.fits(&so_far, 4), "a token of nothing would never end");
    }
}
