//! Safe anchors: an action that breaks a limit is moved to the nearest that does not and held there, and what comes
//! after it is decided anew around it.
//!
//! Source: ReflectDrive (arXiv 2509.20109), safety stage: the earliest violation first, as later actions are decided
//! anew anyway; neighbouring bins are neighbouring values, so that a search among bins is one in space. Here a token
//! is one dimension of one action, and every offending dimension of the earliest offending action is anchored at once.

use super::masked::MaskedDecoder;

/// How far and how often actions are moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AnchorSearch {
    /// Farthest that a token is moved (bins).
    pub reach: usize,
    /// Passes at most in which the rest is decided anew; what still breaks a limit after them is moved all the same.
    pub passes: usize,
    /// Rounds of one pass.
    pub rounds: usize,
}

/// What became of one chunk.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Anchored {
    /// Passes in which the rest was decided anew.
    pub passes: usize,
    /// Tokens that were moved.
    pub moved: usize,
    /// Largest excess that no bin within reach could mend; 0: none.
    pub excess: f64,
}

impl AnchorSearch {
    /// Looks at a decided chunk of actions of `dim` tokens; true when a part of it is to be decided anew.
    ///
    /// `excess` says by how much the token at a position breaks a limit, at most 0 when it does not; it may depend on
    /// the tokens up to there alone.
    pub fn repair(
        &self,
        decoder: &mut MaskedDecoder,
        dim: usize,
        done: &mut Anchored,
        excess: impl Fn(usize, &[usize]) -> f64,
    ) -> bool {
        let mut tokens = decoder.decided();
        let offends =
            |p: &usize, tokens: &[usize]| !decoder.is_frozen(*p) && excess(*p, tokens) > 0.0;
        let Some(first) = (0..tokens.len()).find(|p| offends(p, &tokens)) else { return false };
        if done.passes >= self.passes || dim == 0 {
            self.settle(decoder, done, excess);
            return false;
        }
        let begin = first - first % dim;
        for position in first..(begin + dim).min(tokens.len()) {
            self.mend(decoder, position, &mut tokens, done, &excess);
        }
        decoder.reopen(begin, self.rounds);
        // After the last action nothing may be left that is not held.
        let open = !decoder.is_done();
        done.passes += usize::from(open);
        open
    }

    /// Moves every token that breaks a limit, in order, with nothing decided anew.
    pub fn settle(
        &self,
        decoder: &mut MaskedDecoder,
        done: &mut Anchored,
        excess: impl Fn(usize, &[usize]) -> f64,
    ) {
        let mut tokens = decoder.decided();
        for position in 0..tokens.len() {
            self.mend(decoder, position, &mut tokens, done, &excess);
        }
    }

    /// Moves the token at `position` to the nearest bin that breaks no limit, or to the one that does so least, if it
    /// breaks one now; and holds it there.
    fn mend(
        &self,
        decoder: &mut MaskedDecoder,
        position: usize,
        tokens: &mut [usize],
        done: &mut Anchored,
        excess: impl Fn(usize, &[usize]) -> f64,
    ) {
        let before = excess(position, tokens);
        if decoder.is_frozen(position) || before <= 0.0 {
            return;
        }
        let own = tokens[position];
        let mut best = (before, own);
        // Nearest first, and of two as near the lower: the first without excess is taken.
        let near = (1..=self.reach).flat_map(|d| [own.checked_sub(d), own.checked_add(d)]);
        for bin in near.flatten().filter(|bin| decoder.may_be(position, *bin)) {
            tokens[position] = bin;
            let left = excess(position, tokens).max(0.0);
            if left < best.0 {
                best = (left, bin);
            }
            if left == 0.0 {
                break;
            }
        }
        tokens[position] = best.1;
        decoder.freeze(position, best.1);
        done.moved += usize::from(best.1 != own);
        done.excess = done.excess.max(best.0);
    }
}
