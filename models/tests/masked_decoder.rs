//! What holds for the masked decoder whatever the network says.

use proptest::prelude::*;
use sinew_models::heads::{
    AnchorSearch, Anchored, Confidence, DecodeError, MaskSchedule, MaskedDecoder, Masking,
};

const BINS: usize = 7;
const MASK: usize = BINS;

/// Logits that depend on the tokens, as a network's do, and on `seed`.
fn logits(tokens: &[usize], seed: u64) -> Vec<f32> {
    let mix = |mut z: u64| {
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z ^ (z >> 29)
    };
    let context = tokens.iter().fold(seed, |h, t| mix(h ^ (*t as u64 + 1)));
    (0..tokens.len() * BINS)
        .map(|i| {
            let own = mix(seed.wrapping_add(i as u64 * 0x9E37_79B9));
            let all = mix(context.wrapping_add(i as u64));
            (own % 1000) as f32 / 200.0 + (all % 1000) as f32 / 400.0
        })
        .collect()
}

fn run(decoder: &mut MaskedDecoder, seed: u64) -> Vec<usize> {
    while !decoder.is_done() {
        let logits = logits(&decoder.tokens(MASK), seed);
        decoder.step(&logits).expect("the logits fit");
    }
    decoder.tokens(MASK)
}

/// By how many bins more than `most` a token is away from its dimension's token of the action before.
fn too_far(dim: usize, most: usize) -> impl Fn(usize, &[usize]) -> f64 {
    move |position, tokens| {
        let Some(before) = position.checked_sub(dim) else { return 0.0 };
        tokens[position].abs_diff(tokens[before]) as f64 - most as f64
    }
}

/// Decides a chunk and mends it until nothing is to be decided anew.
fn mended(
    decoder: &mut MaskedDecoder,
    search: AnchorSearch,
    dim: usize,
    most: usize,
    seed: u64,
) -> Anchored {
    let mut done = Anchored::default();
    loop {
        run(decoder, seed);
        let held: Vec<_> = frozen(decoder);
        if !search.repair(decoder, dim, &mut done, too_far(dim, most)) {
            return done;
        }
        let now = frozen(decoder);
        assert!(held.iter().all(|h| now.contains(h)), "what is held stays as it is");
        assert!(now.len() > held.len(), "every pass holds more");
    }
}

/// Positions and bins that are fixed.
fn frozen(decoder: &MaskedDecoder) -> Vec<(usize, usize)> {
    let tokens = decoder.decided();
    (0..tokens.len()).filter(|p| decoder.is_frozen(*p)).map(|p| (p, tokens[p])).collect()
}

prop_compose! {
    fn maskings()(
        linear in any::<bool>(),
        gap in any::<bool>(),
        temperature in prop_oneof![Just(0.0f32), 0.1f32..2.0],
        sure in prop_oneof![Just(2.0f32), 0.2f32..1.0],
        remask_below in prop_oneof![Just(0.0f32), 0.1f32..1.0],
        remask_drop in prop_oneof![Just(1.0f32), 0.0f32..0.5],
    ) -> Masking {
        let schedule = if linear { MaskSchedule::Linear } else { MaskSchedule::Cosine };
        let confidence = if gap { Confidence::Gap } else { Confidence::Max };
        Masking { schedule, confidence, temperature, sure, remask_below, remask_drop }
    }
}

proptest! {
    #[test]
    fn all_is_decided_after_the_last_round(
        masking in maskings(), length in 0usize..40, rounds in 1usize..14, seed: u64,
    ) {
        let mut decoder = MaskedDecoder::new(length, BINS, rounds, masking, seed);
        let tokens = run(&mut decoder, seed);
        prop_assert!(decoder.done() <= rounds);
        prop_assert!(tokens.iter().all(|t| *t < BINS));
    }

    #[test]
    fn frozen_tokens_never_change(
        masking in maskings(), frozen in prop::collection::vec(prop::option::of(0..BINS), 1..40),
        rounds in 1usize..14, seed: u64,
    ) {
        let mut decoder = MaskedDecoder::new(frozen.len(), BINS, rounds, masking, seed);
        for (position, bin) in frozen.iter().enumerate() {
            if let Some(bin) = bin { decoder.freeze(position, *bin); }
        }
        while !decoder.is_done() {
            let logits = logits(&decoder.tokens(MASK), seed);
            decoder.step(&logits).expect("the logits fit");
            for (token, bin) in decoder.tokens(MASK).iter().zip(&frozen) {
                prop_assert!(bin.is_none_or(|bin| bin == *token));
            }
        }
    }

    #[test]
    fn forbidden_bins_are_never_chosen(
        masking in maskings(), rounds in 1usize..14, seed: u64, early: bool,
        allowed in prop::collection::vec(prop::collection::btree_set(0..BINS, 1..BINS), 1..30),
    ) {
        let mut decoder = MaskedDecoder::new(allowed.len(), BINS, rounds, masking, seed);
        for (position, bins) in allowed.iter().enumerate() {
            decoder.allow(position, |bin| bins.contains(&bin)).expect("there is one");
        }
        let tokens = if early {
            let logits = logits(&decoder.tokens(MASK), seed);
            decoder.step(&logits).expect("the logits fit");
            prop_assert!(decoder.finish() && decoder.is_done());
            decoder.tokens(MASK)
        } else {
            run(&mut decoder, seed)
        };
        prop_assert!(tokens.iter().zip(&allowed).all(|(token, bins)| bins.contains(token)));
    }

    #[test]
    fn an_early_stop_gives_the_same_tokens(
        masking in maskings(), length in 1usize..40, rounds in 2usize..14, seed: u64,
    ) {
        // Tokens that are never taken back make the rounds after the last decision idle.
        let masking = Masking { sure: 0.3, remask_below: 0.0, remask_drop: 1.0, ..masking };
        let mut decoder = MaskedDecoder::new(length, BINS, rounds, masking, seed);
        let early = run(&mut decoder, seed);
        while decoder.done() < rounds {
            let logits = logits(&decoder.tokens(MASK), seed);
            decoder.step(&logits).expect("the logits fit");
        }
        prop_assert_eq!(early, decoder.tokens(MASK));
    }

    #[test]
    fn a_seed_gives_one_result(masking in maskings(), length in 1usize..40, seed: u64) {
        let tokens = || run(&mut MaskedDecoder::new(length, BINS, 6, masking, seed), seed);
        prop_assert_eq!(tokens(), tokens());
    }

    #[test]
    fn without_context_the_rounds_do_not_matter(length in 1usize..40, rounds in 1usize..14, seed: u64) {
        // Temperature 0 and logits that no token changes: always each position's most likely bin.
        let fixed = logits(&vec![MASK; length], seed);
        let decode = |rounds| {
            let mut decoder = MaskedDecoder::new(length, BINS, rounds, Masking::default(), seed);
            while !decoder.is_done() { decoder.step(&fixed).expect("the logits fit"); }
            decoder.tokens(MASK)
        };
        prop_assert_eq!(decode(rounds), decode(1));
    }

    #[test]
    fn the_schedule_says_how_many_stay(linear: bool, length in 2usize..60, rounds in 1usize..14, seed: u64) {
        let schedule = if linear { MaskSchedule::Linear } else { MaskSchedule::Cosine };
        let masking = Masking { schedule, ..Masking::default() };
        let mut decoder = MaskedDecoder::new(length, BINS, rounds, masking, seed);
        for k in 1..rounds {
            let logits = logits(&decoder.tokens(MASK), seed);
            decoder.step(&logits).expect("the logits fit");
            let r = k as f64 / rounds as f64;
            let share = if linear { 1.0 - r } else { (std::f64::consts::FRAC_PI_2 * r).cos() };
            let expected = ((length as f64 * share).floor() as usize).clamp(1, length - 1);
            prop_assert_eq!(decoder.unknown(), expected);
        }
    }
}

proptest! {
    #[test]
    fn anchors_leave_no_action_that_breaks_a_limit(
        masking in maskings(), given in prop::collection::vec(prop::option::weighted(0.2, 0..BINS), 1..40),
        dim in 1usize..4, most in 0usize..BINS, passes in 0usize..12, rounds in 1usize..4, seed: u64,
    ) {
        let mut decoder = MaskedDecoder::new(given.len(), BINS, 5, masking, seed);
        for (position, bin) in given.iter().enumerate() {
            if let Some(bin) = bin { decoder.freeze(position, *bin); }
        }
        // Every bin is within reach, so that the bin of the action before always is one that breaks nothing.
        let search = AnchorSearch { reach: BINS, passes, rounds };
        let done = mended(&mut decoder, search, dim, most, seed);
        let tokens = decoder.tokens(MASK);
        let excess = too_far(dim, most);
        for (position, bin) in given.iter().enumerate() {
            match bin {
                Some(bin) => prop_assert_eq!(tokens[position], *bin, "given ones are never moved"),
                None => prop_assert!(excess(position, &tokens) <= 0.0, "{} of {:?}", position, tokens),
            }
        }
        prop_assert!(done.passes <= passes && done.excess == 0.0);
        prop_assert!(decoder.done() <= 5 + passes * rounds);
    }

    #[test]
    fn a_short_reach_tells_what_is_left(
        masking in maskings(), length in 1usize..40, dim in 1usize..4, reach in 0usize..3,
        allowed in prop::collection::vec(prop::collection::btree_set(0..BINS, 1..BINS), 40), seed: u64, early: bool,
    ) {
        let mut decoder = MaskedDecoder::new(length, BINS, 5, masking, seed);
        for (position, bins) in allowed.iter().enumerate().take(length) {
            decoder.allow(position, |bin| bins.contains(&bin)).expect("there is one");
        }
        let search = AnchorSearch { reach, passes: 4, rounds: 2 };
        let done = if early {
            run(&mut decoder, seed);
            let mut done = Anchored::default();
            search.settle(&mut decoder, &mut done, too_far(dim, 1));
            done
        } else {
            mended(&mut decoder, search, dim, 1, seed)
        };
        let tokens = decoder.tokens(MASK);
        let excess = too_far(dim, 1);
        let worst = (0..length).map(|p| excess(p, &tokens)).fold(0.0, f64::max);
        prop_assert_eq!(worst, done.excess);
        prop_assert!(tokens.iter().zip(&allowed).all(|(token, bins)| bins.contains(token)));
    }

    #[test]
    fn a_chunk_that_breaks_no_limit_is_left_as_it_is(masking in maskings(), length in 1usize..40, seed: u64) {
        let mut decoder = MaskedDecoder::new(length, BINS, 5, masking, seed);
        let before = run(&mut decoder, seed);
        let search = AnchorSearch { reach: BINS, passes: 4, rounds: 2 };
        let done = mended(&mut decoder, search, 2, BINS, seed);
        prop_assert_eq!(done, Anchored::default());
        prop_assert_eq!(decoder.tokens(MASK), before);
    }
}

/// The published example: 56 tokens in 12 rounds.
#[test]
fn decided_tokens_a_round_are_the_published_ones() {
    let mut decoder = MaskedDecoder::new(56, BINS, 12, Masking::default(), 0);
    let mut decided = Vec::new();
    while !decoder.is_done() {
        let before = decoder.unknown();
        decoder.step(&logits(&decoder.tokens(MASK), 3)).expect("the logits fit");
        decided.push(before - decoder.unknown());
    }
    assert_eq!(decided, [1, 1, 3, 3, 4, 5, 5, 6, 7, 7, 7, 7]);
}

#[test]
fn equally_sure_tokens_are_decided_in_order() {
    let masking = Masking { schedule: MaskSchedule::Linear, ..Masking::default() };
    let mut decoder = MaskedDecoder::new(8, BINS, 4, masking, 5);
    for round in 1..=4 {
        decoder.step(&[0.5; 8 * BINS]).expect("the logits fit");
        let known: Vec<bool> = decoder.tokens(MASK).iter().map(|t| *t != MASK).collect();
        let expected: Vec<bool> = (0..8).map(|i| i < 2 * round).collect();
        assert_eq!(known, expected, "after round {round}");
    }
    assert_eq!(decoder.tokens(MASK), [0; 8], "among equal bins the first");
}

/// One token loses the network's trust once the other is known.
fn disagreeing(tokens: &[usize]) -> Vec<f32> {
    let mut out = vec![0.0; tokens.len() * BINS];
    out[1] = if tokens[1] == MASK && tokens[2] == MASK { 6.0 } else { 0.0 };
    out[3] = if tokens[1] == MASK && tokens[2] == MASK { 0.0 } else { 1.5 };
    out[BINS + 2] = 4.0;
    for position in 2..tokens.len() {
        out[position * BINS + 2] = 3.0;
    }
    out
}

#[test]
fn a_token_that_lost_trust_is_decided_anew() {
    let masking = Masking { schedule: MaskSchedule::Linear, ..Masking::default() };
    for (masking, expected) in [
        (masking, 1),
        (Masking { remask_drop: 0.3, ..masking }, 3),
        (Masking { remask_below: 0.9, ..masking }, 3),
    ] {
        let mut decoder = MaskedDecoder::new(6, BINS, 6, masking, 5);
        decoder.step(&disagreeing(&decoder.tokens(MASK))).expect("the logits fit");
        assert_eq!(decoder.tokens(MASK)[0], 1, "the surest is decided first");
        while !decoder.is_done() {
            decoder.step(&disagreeing(&decoder.tokens(MASK))).expect("the logits fit");
        }
        assert_eq!(decoder.tokens(MASK)[0], expected, "{masking:?}");
    }
}

#[test]
fn temperature_makes_seeds_differ() {
    let masking = Masking { temperature: 1.0, ..Masking::default() };
    let tokens = |seed| run(&mut MaskedDecoder::new(30, BINS, 6, masking, seed), 1);
    assert!((1..20).any(|seed| tokens(seed) != tokens(0)));
    let certain = Masking { temperature: 0.0, ..masking };
    let tokens = |seed| run(&mut MaskedDecoder::new(30, BINS, 6, certain, seed), 1);
    assert!((1..20).all(|seed| tokens(seed) == tokens(0)));
}

#[test]
fn unusable_logits_are_refused() {
    let mut decoder = MaskedDecoder::new(2, 3, 4, Masking::default(), 0);
    assert_eq!(decoder.step(&[0.0; 5]), Err(DecodeError::Size { expected: 6, found: 5 }));
    let bad = [0.0, 1.0, 0.0, 0.0, f32::NAN, 0.0];
    assert_eq!(decoder.step(&bad), Err(DecodeError::NotFinite { position: 1 }));
    assert_eq!(decoder.allow(1, |_| false), Err(DecodeError::NoBinLeft { position: 1 }));
    assert!(!decoder.finish(), "nothing is known before the first round");
    assert!(decoder.set_rounds(2) && decoder.rounds() == 2);
}
