//! Masked decoding: all tokens start unknown and are decided over a few rounds, the surest first.
//!
//! The decoder is a state machine over logits. Each round the caller runs its network on
//! [`MaskedDecoder::tokens`] and gives the logits of every position to [`MaskedDecoder::step`].
//!
//! Source: Discrete Diffusion VLA (arXiv 2508.20072), section 3.3 and appendix B, after MaskGIT
//! (arXiv 2202.04200). The check for a drop of confidence is of that paper's first version. Tokens that are
//! fixed beforehand and bins that may not be chosen follow ReflectDrive (arXiv 2509.20109): the model decides
//! the rest around them, without gradients.

use serde::Deserialize;

use crate::random::SplitMix64;

/// How many tokens stay unknown after a fraction `r` of the rounds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MaskSchedule {
    /// cos(π/2·r): few at first, many at last.
    #[default]
    Cosine,
    /// 1 − r: as many in each round.
    Linear,
}

impl MaskSchedule {
    fn share(self, r: f64) -> f64 {
        match self {
            Self::Cosine => (std::f64::consts::FRAC_PI_2 * r).cos(),
            Self::Linear => 1.0 - r,
        }
    }
}

/// What makes a token sure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Confidence {
    /// The probability of the chosen bin.
    #[default]
    Max,
    /// The distance from the most likely bin's probability to the next one's.
    Gap,
}

/// How to decode.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Masking {
    /// Tokens that stay unknown, by round.
    pub schedule: MaskSchedule,
    /// What the order goes by.
    pub confidence: Confidence,
    /// Scale of the Gumbel noise on choice and order in the first round; falls to 0 in the last. 0: the most
    /// likely bins, the same for every seed.
    pub temperature: f32,
    /// A token this sure is decided even when the schedule has room for fewer; above 1: none.
    pub sure: f32,
    /// A decided token becomes unknown again when no bin of its position is more likely than this, times the
    /// fraction of rounds done; 0: never.
    pub remask_below: f32,
    /// A decided token becomes unknown again when its probability has fallen by more than this since; 1 and
    /// above: never.
    pub remask_drop: f32,
}

impl Default for Masking {
    fn default() -> Self {
        Self {
            schedule: MaskSchedule::Cosine,
            confidence: Confidence::Max,
            temperature: 0.0,
            sure: 2.0,
            remask_below: 0.0,
            remask_drop: 1.0,
        }
    }
}

/// Why the tokens cannot be decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// The logits have another size.
    #[error("{found} logits were given for {expected}")]
    Size {
        /// Positions times bins.
        expected: usize,
        /// Values given.
        found: usize,
    },
    /// A logit is no number.
    #[error("a logit of token {position} is not finite")]
    NotFinite {
        /// Index of the token.
        position: usize,
    },
    /// Every bin of a position is forbidden.
    #[error("no bin of token {position} is allowed; the limits leave it no value")]
    NoBinLeft {
        /// Index of the token.
        position: usize,
    },
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Token {
    Unknown,
    /// Chosen in `round`, with this probability then.
    Decided {
        bin: usize,
        round: usize,
        probability: f32,
    },
    /// Given beforehand.
    Frozen(usize),
}

/// What one round's logits say of one position.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
struct Choice {
    bin: usize,
    probability: f32,
    /// Probability of the most likely bin.
    largest: f32,
    /// Probability of the bin that is decided, or of the chosen one.
    kept: f32,
    /// Largest logit, and the sum of e to the power of each less it: what probabilities are made of.
    top: f32,
    sum: f32,
    score: f32,
    order: f32,
}

/// Decides the tokens of one chunk.
#[derive(Debug, Clone)]
pub struct MaskedDecoder {
    masking: Masking,
    bins: usize,
    /// Rounds at most, and rounds done, in all passes.
    rounds: usize,
    done: usize,
    /// Rounds done before the pass under way.
    before: usize,
    tokens: Vec<Token>,
    /// Per position and bin, whether it may not be chosen; empty: all may.
    forbidden: Vec<bool>,
    /// The newest round's choice at every position.
    newest: Vec<Choice>,
    random: SplitMix64,
}

impl MaskedDecoder {
    /// `length` unknown tokens of `bins` bins, to be decided in at most `rounds` (at least 1).
    pub fn new(length: usize, bins: usize, rounds: usize, masking: Masking, seed: u64) -> Self {
        Self {
            masking,
            bins,
            rounds: rounds.max(1),
            done: 0,
            before: 0,
            tokens: vec![Token::Unknown; length],
            forbidden: Vec::new(),
            newest: Vec::new(),
            random: SplitMix64::new(seed),
        }
    }

    /// Fixes the token at `position` to `bin`: it is never decided anew. Positions past the end are ignored.
    pub fn freeze(&mut self, position: usize, bin: usize) {
        if let Some(token) = self.tokens.get_mut(position) {
            *token = Token::Frozen(bin.min(self.bins - 1));
        }
    }

    /// True when the token at `position` is fixed.
    pub fn is_frozen(&self, position: usize) -> bool {
        matches!(self.tokens.get(position), Some(Token::Frozen(_)))
    }

    /// Whether there is such a bin and the token at `position` may take it.
    pub fn may_be(&self, position: usize, bin: usize) -> bool {
        let forbidden = self.forbidden.get(position * self.bins + bin).copied();
        bin < self.bins && !forbidden.unwrap_or(false)
    }

    /// Another pass: what lies before `position` is fixed as it is, what is not fixed from there on becomes unknown, to
    /// be decided in at most `rounds` (at least 1) more.
    pub fn reopen(&mut self, position: usize, rounds: usize) {
        for (at, token) in self.tokens.iter_mut().enumerate() {
            *token = match *token {
                Token::Decided { bin, .. } if at < position => Token::Frozen(bin),
                Token::Frozen(bin) => Token::Frozen(bin),
                _ => Token::Unknown,
            };
        }
        self.before = self.done;
        self.rounds = self.done + rounds.max(1);
        // The choices of the pass before are those that are not wanted.
        self.newest.clear();
    }

    /// Lets the token at `position` take only the bins that `allowed` says.
    ///
    /// # Errors
    /// [`DecodeError::NoBinLeft`] when there is none.
    pub fn allow(
        &mut self,
        position: usize,
        allowed: impl Fn(usize) -> bool,
    ) -> Result<(), DecodeError> {
        self.forbidden.resize(self.tokens.len() * self.bins, false);
        let Some(row) = self.forbidden.chunks_exact_mut(self.bins).nth(position) else {
            return Ok(());
        };
        for (bin, forbidden) in row.iter_mut().enumerate() {
            *forbidden = !allowed(bin);
        }
        if row.iter().all(|f| *f) { Err(DecodeError::NoBinLeft { position }) } else { Ok(()) }
    }

    /// Number of tokens.
    pub fn length(&self) -> usize {
        self.tokens.len()
    }

    /// The tokens as the network takes them: `mask` where nothing is decided.
    pub fn tokens(&self, mask: usize) -> Vec<usize> {
        let id = |token: &Token| match token {
            Token::Unknown => mask,
            Token::Decided { bin, .. } | Token::Frozen(bin) => *bin,
        };
        self.tokens.iter().map(id).collect()
    }

    /// The tokens of a decided chunk; 0 where nothing is decided.
    pub fn decided(&self) -> Vec<usize> {
        self.tokens(0)
    }

    /// Tokens that are not decided.
    pub fn unknown(&self) -> usize {
        self.tokens.iter().filter(|t| **t == Token::Unknown).count()
    }

    /// True when every token is decided; rounds that the schedule has left are not needed then.
    pub fn is_done(&self) -> bool {
        self.unknown() == 0
    }

    /// Rounds at most.
    pub fn rounds(&self) -> usize {
        self.rounds
    }

    /// Rounds done.
    pub fn done(&self) -> usize {
        self.done
    }

    /// Changes the number of rounds; false once the first is done.
    pub fn set_rounds(&mut self, rounds: usize) -> bool {
        let may = self.done == 0 && rounds > 0;
        if may {
            self.rounds = rounds;
        }
        may
    }

    /// Decides what is unknown as the newest round chose; false before the first round.
    pub fn finish(&mut self) -> bool {
        for (token, choice) in self.tokens.iter_mut().zip(&self.newest) {
            if *token == Token::Unknown {
                *token = choice.decided(self.done);
            }
        }
        !self.newest.is_empty() || self.is_done()
    }

    /// One round with the `logits` of every position, `[length, bins]` row by row.
    ///
    /// The last round decides everything that is left.
    ///
    /// # Errors
    /// [`DecodeError::Size`]; [`DecodeError::NotFinite`] for a logit that may be chosen and is no number.
    pub fn step(&mut self, logits: &[f32]) -> Result<(), DecodeError> {
        let expected = self.tokens.len() * self.bins;
        if logits.len() != expected {
            return Err(DecodeError::Size { expected, found: logits.len() });
        }
        let last = self.done + 1 >= self.rounds;
        // Of this pass.
        let (done, rounds) = (self.done - self.before, self.rounds - self.before);
        let r = (done + 1) as f64 / rounds as f64;
        let noise = if last { 0.0 } else { self.masking.temperature * (1.0 - r) as f32 };
        self.newest = self.choose(logits, noise)?;
        self.decide(if last { 0 } else { self.stay(r) });
        if !last {
            self.forget();
        }
        self.done += 1;
        Ok(())
    }

    /// Tokens that stay unknown after a fraction `r` of the rounds, by the schedule.
    fn stay(&self, r: f64) -> usize {
        let free = self.tokens.iter().filter(|t| !matches!(t, Token::Frozen(_))).count();
        let stay = (free as f64 * self.masking.schedule.share(r)).floor() as usize;
        stay.clamp(1, free.saturating_sub(1).max(1))
    }

    fn choose(&mut self, logits: &[f32], noise: f32) -> Result<Vec<Choice>, DecodeError> {
        let mut out = Vec::with_capacity(self.tokens.len());
        for (position, row) in logits.chunks_exact(self.bins).enumerate() {
            let forbidden = self.forbidden.get(position * self.bins..).unwrap_or_default();
            let (noise, decided) = match self.tokens[position] {
                Token::Unknown => (noise, None),
                Token::Decided { bin, .. } | Token::Frozen(bin) => (0.0, Some(bin)),
            };
            let mut choice =
                choose(row, forbidden, noise, self.masking.confidence, &mut self.random)
                    .ok_or(DecodeError::NotFinite { position })?;
            if let Some(value) = decided.and_then(|bin| row.get(bin)) {
                choice.kept = (value - choice.top).exp() / choice.sum;
            }
            out.push(choice);
        }
        Ok(out)
    }

    /// Decides unknown tokens, the surest first, until `stay` are left; and all that are sure enough.
    fn decide(&mut self, stay: usize) {
        let mut unknown: Vec<usize> =
            (0..self.tokens.len()).filter(|i| self.tokens[*i] == Token::Unknown).collect();
        let wanted = unknown.len().saturating_sub(stay);
        let newest = &self.newest;
        // Stable: among equally sure ones the first comes first.
        unknown.sort_by(|a, b| newest[*b].order.total_cmp(&newest[*a].order));
        for (rank, position) in unknown.into_iter().enumerate() {
            let choice = newest[position];
            if rank < wanted || choice.score >= self.masking.sure {
                self.tokens[position] = choice.decided(self.done);
            }
        }
    }

    /// Makes tokens that were decided in earlier rounds unknown again where the newest logits disagree.
    fn forget(&mut self) {
        let (done, rounds) = (self.done - self.before, self.rounds - self.before);
        let below = self.masking.remask_below * (done as f32 / rounds as f32);
        for (token, choice) in self.tokens.iter_mut().zip(&self.newest) {
            let Token::Decided { round, probability, .. } = *token else { continue };
            let drop = self.masking.remask_drop;
            let fell = drop < 1.0 && probability - choice.kept > drop;
            if round < self.done && (choice.largest < below || fell) {
                *token = Token::Unknown;
            }
        }
    }
}

impl Choice {
    fn decided(self, round: usize) -> Token {
        Token::Decided { bin: self.bin, round, probability: self.probability }
    }
}

fn gumbel(random: &mut SplitMix64) -> f32 {
    -(-random.open_unit().ln()).ln() as f32
}

/// The bin that a position's logits choose; none when one that may be chosen is not finite.
fn choose(
    logits: &[f32],
    forbidden: &[bool],
    noise: f32,
    confidence: Confidence,
    random: &mut SplitMix64,
) -> Option<Choice> {
    let allowed = |bin: usize| !forbidden.get(bin).copied().unwrap_or(false);
    let bins = || logits.iter().copied().enumerate().filter(|(bin, _)| allowed(*bin));
    if bins().any(|(_, v)| !v.is_finite()) {
        return None;
    }
    let top = bins().map(|(_, v)| v).fold(f32::NEG_INFINITY, f32::max);
    let sum: f32 = bins().map(|(_, v)| (v - top).exp()).sum();
    let probability = |v: f32| (v - top).exp() / sum;
    let mut best = (f32::NEG_INFINITY, 0, 0.0);
    let (mut first, mut second) = (0.0f32, 0.0f32);
    for (bin, v) in bins() {
        let noisy = if noise > 0.0 { v + noise * gumbel(random) } else { v };
        if noisy > best.0 {
            best = (noisy, bin, v);
        }
        let p = probability(v);
        if p > first {
            (first, second) = (p, first);
        } else if p > second {
            second = p;
        }
    }
    let (_, bin, v) = best;
    let chosen = probability(v);
    let score = match confidence {
        Confidence::Max => chosen,
        Confidence::Gap => first - second,
    };
    let jitter = if noise > 0.0 { noise * gumbel(random) } else { 0.0 };
    let order = score.max(f32::MIN_POSITIVE).ln() + jitter;
    Some(Choice { bin, probability: chosen, largest: first, kept: chosen, top, sum, score, order })
}
