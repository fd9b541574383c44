//! Same numbers as our PyTorch references (`tests/reference`)? Masked diffusion and parallel decoding.
//!
//! Tolerances as in the parity tests: 1e-4 for an intermediate, 5e-5 for the chunk; decoded tokens are equal.

mod common;

use std::path::PathBuf;
use std::sync::Arc;

use candle_core::Result;
use common::{Case, fixtures, heads_apart, max_difference};
use sinew_models::heads::{Confidence, MaskSchedule, MaskedDecoder, Masking};
use sinew_models::kernels::{Matrix, Planes};
use sinew_models::masked::{MaskedPolicy, MaskedVla};
use sinew_models::oft::OftVla;
use sinew_models::smolvla::{Inputs, Preparer, VisionFeatures};
use sinew_models::{Checkpoint, LoadOptions, QuantType, load_policy, quantize};
use sinew_runtime::{ActionChunk, ChunkRequest, Policy, PolicyError, Prefix, PrefixUse, inference};

const INTERMEDIATE: f32 = 1e-4;
const CHUNK: f32 = 5e-5;

fn folder(name: &str) -> PathBuf {
    fixtures().join("reference").join(name)
}

fn cases(name: &str) -> Vec<(serde_json::Value, Case)> {
    let text = std::fs::read_to_string(folder(name).join("cases.json")).expect("it is committed");
    let list: Vec<serde_json::Value> = serde_json::from_str(&text).expect("it is a list");
    let open = |entry: &serde_json::Value| {
        let file = format!("{}.safetensors", entry["name"].as_str().expect("a name"));
        Case::open(&folder(name).join(file))
    };
    list.into_iter().map(|entry| (entry.clone(), open(&entry))).collect()
}

fn check(name: &str, ours: &[f32], theirs: &[f32], tolerance: f32) -> f32 {
    let difference = max_difference(ours, theirs);
    assert!(difference <= tolerance, "{name} differs by {difference:e}");
    println!("{name}: {difference:.1e}");
    difference
}

fn actions(chunk: &ActionChunk) -> Vec<f32> {
    chunk.values().iter().map(|v| *v as f32).collect()
}

fn task(entry: &serde_json::Value) -> &str {
    entry["task"].as_str().expect("an instruction")
}

/// Inputs and image tokens of a case, compared with what was recorded of them.
fn observed(
    checkpoint: &Checkpoint,
    entry: &serde_json::Value,
    case: &Case,
    encode: impl Fn(&Inputs, &Planes) -> Result<VisionFeatures>,
) -> (Inputs, Vec<Arc<Matrix>>) {
    let mut preparer = Preparer::new(checkpoint, 0).expect("the pipelines are whole");
    let inputs = preparer.prepare(&case.observation(0, task(entry))).expect("it fits");
    let ids: Vec<f32> = inputs.tokens.iter().map(|t| *t as f32).collect();
    assert_eq!(ids, case.get("ids").values);
    let mut tokens = Vec::new();
    for (i, pixels) in inputs.pixels.iter().enumerate() {
        let features = encode(&inputs, pixels).expect("the image fits");
        if case.has("vision.0.pixels") {
            let get = |part: &str| &case.get(&format!("vision.{i}.{part}")).values;
            check("pixels", pixels.values.values(), get("pixels"), 1e-5);
            check("last_hidden", features.last_hidden.values(), get("last_hidden"), INTERMEDIATE);
            check("tokens", features.tokens.values(), get("tokens"), INTERMEDIATE);
        }
        tokens.push(Arc::new(features.tokens));
    }
    (inputs, tokens)
}

fn masking(entry: &serde_json::Value) -> Masking {
    let number = |key: &str| entry[key].as_f64().map(|v| v as f32);
    let default = Masking::default();
    Masking {
        schedule: match entry["schedule"].as_str() {
            Some("linear") => MaskSchedule::Linear,
            _ => MaskSchedule::Cosine,
        },
        confidence: match entry["confidence"].as_str() {
            Some("gap") => Confidence::Gap,
            _ => Confidence::Max,
        },
        temperature: number("temperature").unwrap_or(0.0),
        sure: number("commit_threshold").unwrap_or(default.sure),
        remask_below: number("remask_threshold").unwrap_or(default.remask_below),
        remask_drop: number("remask_drop").unwrap_or(default.remask_drop),
    }
}

/// Rows of values in the case's list, such as `frozen`; empty when it has none.
fn numbers(entry: &serde_json::Value, key: &str) -> Vec<f64> {
    let list = entry[key].as_array().map(Vec::as_slice).unwrap_or_default();
    let flat = list.iter().flat_map(|v| v.as_array().cloned().unwrap_or_else(|| vec![v.clone()]));
    flat.map(|v| v.as_f64().expect("a number")).collect()
}

#[test]
fn masked_rounds_and_tokens_are_the_references() {
    let checkpoint = Checkpoint::open(&folder("masked"), true).expect("the checkpoint is whole");
    let model = MaskedVla::load(&checkpoint).expect("it loads");
    let preparer = Preparer::new(&checkpoint, 0).expect("the pipelines are whole");
    let (horizon, dim) = model.shape();
    for (entry, case) in cases("masked") {
        let (inputs, images) =
            observed(&checkpoint, &entry, &case, |_, pixels| model.encode_image(pixels));
        let prefix =
            model.prefill(&images, inputs.dummies, &inputs.tokens, &inputs.state).expect("it fits");
        if case.has("prefix.keys") {
            let all = |second: bool| -> Vec<f32> {
                // [layers, K, P, hd].
                let size = *case.get("prefix.keys").shape.last().expect("four dimensions");
                let layers = prefix.layers.iter();
                let sides = layers.map(|layer| if second { &layer.values } else { &layer.keys });
                sides.flat_map(|side| heads_apart(side, size)).collect()
            };
            check("keys", &all(false), &case.get("prefix.keys").values, INTERMEDIATE);
            check("values", &all(true), &case.get("prefix.values").values, INTERMEDIATE);
        }
        let rounds = entry["rounds"].as_u64().expect("a number") as usize;
        let (length, classes) = (horizon * dim, model.bins().classes());
        let seed = entry["seed"].as_u64().unwrap_or(1);
        let mut decoder = MaskedDecoder::new(length, classes, rounds, masking(&entry), seed);
        let boundary = preparer.boundary();
        let frozen = boundary.model_actions(&numbers(&entry, "frozen"), dim).expect("they fit");
        for (position, value) in frozen.iter().enumerate() {
            decoder.freeze(position, model.bins().encode(*value));
        }
        let limits = (numbers(&entry, "lower"), numbers(&entry, "upper"));
        for position in (0..length).filter(|_| !limits.0.is_empty()) {
            let (_, action) = boundary.normalizers();
            let inside = |bin| {
                let x = f64::from(model.bins().decode(bin));
                let value = action.unnormalize(position % dim, x);
                (limits.0[position % dim]..=limits.1[position % dim]).contains(&value)
            };
            decoder.allow(position, inside).expect("there are bins");
        }
        let recorded = &case.get("rounds.tokens").values;
        let mut worst = 0f32;
        for (round, theirs) in recorded.chunks_exact(length).enumerate() {
            let tokens = decoder.tokens(model.mask());
            let ours: Vec<f32> = tokens.iter().map(|t| *t as f32).collect();
            assert_eq!(ours, theirs, "{} before round {round}", entry["name"]);
            let logits = model.logits(&prefix, &tokens).expect("the tokens fit");
            let logits = logits.values();
            if case.has("rounds.logits") {
                let range = round * logits.len()..(round + 1) * logits.len();
                worst = worst.max(max_difference(logits, &case.get("rounds.logits").values[range]));
            }
            decoder.step(logits).expect("they are finite");
        }
        assert!(decoder.is_done(), "{}", entry["name"]);
        let ours: Vec<f32> = decoder.tokens(model.mask()).iter().map(|t| *t as f32).collect();
        assert_eq!(ours, case.get("tokens").values, "{}", entry["name"]);
        println!("{}: logits {worst:.1e}, {} rounds", entry["name"], decoder.done());
        assert!(worst <= INTERMEDIATE, "{} logits differ by {worst:e}", entry["name"]);
    }
}

fn masked_policy() -> MaskedPolicy {
    let checkpoint = Checkpoint::open(&folder("masked"), true).expect("the checkpoint is whole");
    MaskedPolicy::load(&checkpoint, &LoadOptions::default()).expect("it loads")
}

fn prefix(actions: Vec<f64>, frozen: usize, usage: PrefixUse) -> Prefix {
    Prefix { actions, dim: 3, frozen, horizon: 4, usage }
}

#[test]
fn masked_chunks_are_the_references() {
    let mut seen = 0;
    for (entry, case) in cases("masked") {
        let simple =
            ["schedule", "confidence", "commit_threshold", "remask_threshold", "temperature"];
        if simple.iter().any(|key| !entry[key].is_null()) {
            continue; // how to decode is the checkpoint's
        }
        let mut policy = masked_policy();
        let limits: Vec<_> =
            numbers(&entry, "lower").into_iter().zip(numbers(&entry, "upper")).collect();
        if !limits.is_empty() {
            policy.set_limits(&limits).expect("there are bins");
        }
        let frozen = numbers(&entry, "frozen");
        let rows = frozen.len() / 3;
        let prefix = (rows > 0).then(|| prefix(frozen, rows, PrefixUse::Trained));
        let steps = entry["rounds"].as_u64().map(|n| n as usize);
        let request = ChunkRequest { id: 7, denoise_steps: steps, prefix, ..Default::default() };
        let observation = case.observation(0, task(&entry));
        let chunk = inference::run(&mut policy, &observation, &request).expect("it runs");
        let name = entry["name"].to_string();
        check(&name, &actions(&chunk), &case.get("actions.final").values, CHUNK);
        for (i, (low, high)) in limits.iter().cycle().take(chunk.values().len()).enumerate() {
            let value = chunk.values()[i];
            assert!((*low..=*high).contains(&value), "{value} is outside {low} to {high}");
        }
        assert_eq!(chunk.horizon(), 4);
        seen += 1;
    }
    assert!(seen >= 4, "only {seen} cases");
}

#[test]
fn actions_that_change_too_fast_are_anchored() {
    let (entry, case) = cases("masked").swap_remove(0);
    let observation = case.observation(0, task(&entry));
    let mut anchored = masked_policy();
    let mut run = |limits: Option<Vec<f64>>, prefix: Option<Prefix>| {
        anchored.set_step_limits(limits).expect("three limits");
        let request = ChunkRequest { prefix, ..ChunkRequest::default() };
        inference::run(&mut anchored, &observation, &request).expect("it runs")
    };
    let used = |chunk: &ActionChunk| {
        let found = chunk.report.caches.iter().find(|c| c.0 == "anchors");
        found.map(|c| (c.1.lookups, c.1.hits, c.1.error))
    };
    let steps = |chunk: &ActionChunk| -> Vec<f64> {
        (3..12).map(|i| (chunk.values()[i] - chunk.values()[i - 3]).abs()).collect()
    };
    let free = run(None, None);
    assert_eq!(used(&free), None);
    let widest = steps(&free).into_iter().fold(0.0, f64::max);
    let wide = run(Some(vec![widest + 1e-6; 3]), None);
    assert_eq!(
        (used(&wide), wide.values()),
        (Some((0, 0, Some(0.0))), free.values()),
        "none breaks one"
    );

    // Half of it: some are moved, and what comes after them is decided anew.
    let limits = vec![0.6 * widest; 3];
    let narrow = run(Some(limits.clone()), None);
    let (passes, moved, left) = used(&narrow).expect("it is reported");
    println!("widest {widest:.3}: {passes} passes, {moved} moved, {left:?} left");
    assert!(passes > 0 && moved > 0);
    let left = left.expect("a number");
    assert!(
        steps(&narrow).iter().all(|s| *s <= 0.6 * widest + left + 1e-9),
        "{:?}",
        steps(&narrow)
    );
    assert!(narrow.report.denoise_steps > free.report.denoise_steps);

    // An early end moves them where they are, with nothing decided anew.
    let mut policy = masked_policy();
    policy.set_step_limits(Some(limits.clone())).expect("three limits");
    policy.begin(&observation, &ChunkRequest::default()).expect("it fits");
    for _ in 0..4 {
        policy.advance().expect("it runs");
    }
    assert_eq!(policy.finish_early(), Ok(true));
    let early = policy.take_chunk().expect("it is done");
    let (passes, _, left) = used(&early).expect("it is reported");
    let left = left.expect("a number");
    assert_eq!((passes, early.report.denoise_steps), (0, 1));
    assert!(steps(&early).iter().all(|s| *s <= 0.6 * widest + left + 1e-9), "{:?}", steps(&early));

    // Planned actions are kept to the bit, and the first that follows them keeps the limit too.
    let planned = vec![-0.9, -0.1, 0.3];
    let kept = run(Some(limits), Some(prefix(planned.clone(), 1, PrefixUse::Trained)));
    check(
        "planned",
        &actions(&kept)[..3],
        &planned.iter().map(|v| *v as f32).collect::<Vec<_>>(),
        CHUNK,
    );
    let left = used(&kept).and_then(|u| u.2).expect("it is reported");
    assert!(steps(&kept).iter().all(|s| *s <= 0.6 * widest + left + 1e-6), "{:?}", steps(&kept));
    assert_eq!(masked_policy().set_step_limits(Some(vec![1.0, 0.0, 1.0])), Err(3));
}

#[test]
fn a_bundle_holds_a_masked_policy() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let bundle = dir.path().join("masked.gguf");
    quantize(&folder("masked"), QuantType::F16, &bundle).expect("it is written");
    let mut policy = load_policy(&bundle, &LoadOptions::default()).expect("it loads");
    let (entry, case) = cases("masked").swap_remove(0);
    let observation = case.observation(0, task(&entry));
    let chunk = inference::run(policy.as_mut(), &observation, &ChunkRequest::default());
    let chunk = chunk.expect("it runs");
    let difference = max_difference(&actions(&chunk), &case.get("actions.final").values);
    println!("f16 bundle: {difference:.1e}");
    assert!(difference < 0.5, "half precision changes no more than an unsure token: {difference}");
}

#[test]
fn planned_actions_that_it_cannot_use_are_refused() {
    let (entry, case) = cases("masked").swap_remove(0);
    let observation = case.observation(0, task(&entry));
    let mut policy = masked_policy();
    let guided =
        PrefixUse::Guided { schedule: sinew_runtime::MaskSchedule::Linear, max_weight: 5.0 };
    for (actions, frozen, usage) in [
        (vec![0.0; 3], 1, guided),
        (vec![0.0; 3], 1, PrefixUse::WarmStart { time: 0.5 }),
        (vec![0.0; 12], 4, PrefixUse::Trained),
        (vec![f64::NAN; 3], 1, PrefixUse::Trained),
    ] {
        let prefix = Some(prefix(actions, frozen, usage));
        let request = ChunkRequest { prefix, ..ChunkRequest::default() };
        assert!(policy.begin(&observation, &request).is_err(), "{usage:?}, {frozen} frozen");
    }
    assert_eq!(policy.set_limits(&[(-9.0, 9.0), (2.0, 1.0), (0.0, 0.1)]), Err(1));
}

#[test]
fn an_early_end_gives_a_whole_chunk() {
    let (entry, case) = cases("masked").swap_remove(0);
    let mut policy = masked_policy();
    assert_eq!(policy.finish_early(), Err(PolicyError::OutOfTurn("nothing was begun")));
    policy.begin(&case.observation(0, task(&entry)), &ChunkRequest::default()).expect("it fits");
    assert_eq!(policy.finish_early(), Ok(false), "nothing is known yet");
    for _ in 0..4 {
        policy.advance().expect("it runs");
    }
    assert_eq!(policy.set_denoise_steps(2), Ok(false), "too late");
    assert!(policy.take_chunk().is_err(), "one round is done");
    assert_eq!(policy.finish_early(), Ok(true));
    let chunk = policy.take_chunk().expect("it is done");
    assert_eq!((chunk.values().len(), chunk.report.denoise_steps), (12, 1));
    // One round, then the most likely bins: as a single round decides.
    let (entry, case) = cases("masked").into_iter().find(|(e, _)| e["rounds"] == 1).expect("it is");
    policy.begin(&case.observation(0, task(&entry)), &ChunkRequest::default()).expect("it fits");
    for _ in 0..4 {
        policy.advance().expect("it runs");
    }
    assert_eq!(policy.finish_early(), Ok(true));
    let chunk = policy.take_chunk().expect("it is done");
    check("early end", &actions(&chunk), &case.get("actions.final").values, CHUNK);
}

#[test]
fn parallel_decoding_is_the_references() {
    for name in ["oft", "oft_film"] {
        let checkpoint = Checkpoint::open(&folder(name), true).expect("the checkpoint is whole");
        let model = OftVla::load(&checkpoint).expect("it loads");
        for (entry, case) in cases(name) {
            let (inputs, images) = observed(&checkpoint, &entry, &case, |inputs, pixels| {
                model.encode_image(pixels, model.words(&inputs.tokens)?.as_ref())
            });
            let prefix = model
                .embed_prefix(&images, inputs.dummies, &inputs.tokens, &inputs.state)
                .expect("it fits");
            let recorded = |part: &str| &case.get(part).values;
            check("prefix", prefix.values(), recorded("prefix.embeddings"), INTERMEDIATE);
            let states = model.decode(&prefix).expect("it fits");
            check("states", states.values(), recorded("states"), INTERMEDIATE);
            let ours = model.actions(states).expect("it fits");
            let ours = ours.values();
            check("normalised", ours, recorded("actions.normalised"), CHUNK);
            let mut policy = load_policy(&folder(name), &LoadOptions::default()).expect("it loads");
            let observation = case.observation(0, task(&entry));
            let request = ChunkRequest { id: 7, ..ChunkRequest::default() };
            let chunk = inference::run(policy.as_mut(), &observation, &request).expect("it runs");
            check(name, &actions(&chunk), recorded("actions.final"), CHUNK);
            let prefix = Some(prefix_of_one());
            let request = ChunkRequest { prefix, ..ChunkRequest::default() };
            assert!(policy.begin(&observation, &request).is_err(), "it knows no prefix");
        }
    }
}

fn prefix_of_one() -> Prefix {
    prefix(vec![0.0; 3], 1, PrefixUse::Trained)
}
