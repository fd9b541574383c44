//! Rolling buffers of a Diffusion Policy: what the network is told, and what is kept from chunk to chunk.

mod common;

use std::path::Path;

use common::{Case, fixtures, max_difference};
use safetensors::tensor::{Dtype, TensorView, serialize};
use serde_json::json;
use sinew_models::caches::{Branches, CacheOptions, DenoiserCache};
use sinew_models::diffusion::{Condition, DiffusionModel};
use sinew_models::heads::flow::gaussian_noise;
use sinew_models::kernels::Matrix;
use sinew_models::{Checkpoint, LoadOptions, ModelError, load_policy};
use sinew_runtime::{
    ActionChunk, ActionKind, CacheUse, ChunkRequest, MaskSchedule, Observation, Policy,
    PolicyError, Prefix, PrefixUse, Progress, Stamp, Unused, inference,
};

/// State, and the features of two cameras.
const SEEN: usize = 4 + 2 * 2 * 4;
const ACTION: usize = 3;
const HORIZON: usize = 12;
const OBSERVED: usize = 2;
const TAKEN: usize = 5;
const STEPS: usize = 20;
/// Two whole chunks lie ahead, and one more action.
const PARTS: usize = 2;
const EMBEDDING: usize = 8;
const LEVELS: [usize; 2] = [16, 32];
const KERNEL: usize = 3;

/// A policy with the encoder of the repository's transformer and a U-Net, told one timestep or `each` action's: then its
/// first matrix has that of the other, shared evenly among the actions.
fn checkpoint(folder: &Path, each: bool) {
    let mut tensors: Vec<(String, Vec<usize>, Vec<f32>)> = Vec::new();
    let mut add = |name: String, shape: &[usize], mean: f32| {
        let (seed, count) = (tensors.len() as u64, shape.iter().product());
        let inputs = shape[1..].iter().product::<usize>().max(1) as f32;
        let drawn = gaussian_noise(seed, count).into_iter().map(|v| mean + v / inputs.sqrt());
        tensors.push((format!("diffusion.unet.{name}"), shape.to_vec(), drawn.collect()));
    };
    let mut layer = |name: &str, shape: &[usize]| {
        add(format!("{name}.weight"), shape, 0.0);
        add(format!("{name}.bias"), &shape[..1], 0.0);
    };
    let condition = EMBEDDING + SEEN * OBSERVED;
    layer("diffusion_step_encoder.1", &[4 * EMBEDDING, EMBEDDING]);
    layer("diffusion_step_encoder.3", &[EMBEDDING, 4 * EMBEDDING]);
    let mut norms = Vec::new();
    let mut block = |name: String, inputs: usize, outputs: usize| {
        for (conv, from) in [("conv1", inputs), ("conv2", outputs)] {
            layer(&format!("{name}.{conv}.block.0"), &[outputs, from, KERNEL]);
            norms.push((format!("{name}.{conv}.block.1"), outputs));
        }
        layer(&format!("{name}.cond_encoder.1"), &[2 * outputs, condition]);
        if inputs != outputs {
            layer(&format!("{name}.residual_conv"), &[outputs, inputs, 1]);
        }
    };
    let [narrow, wide] = LEVELS;
    for (name, inputs, outputs) in [
        ("down_modules.0", ACTION, narrow),
        ("down_modules.1", narrow, wide),
        ("mid_modules", wide, wide),
        ("up_modules.0", 2 * wide, narrow),
    ] {
        block(format!("{name}.0"), inputs, outputs);
        block(format!("{name}.1"), outputs, outputs);
    }
    layer("down_modules.0.2", &[narrow, narrow, 3]);
    layer("up_modules.0.2", &[narrow, narrow, 4]);
    layer("final_conv.0.block.0", &[narrow, narrow, KERNEL]);
    norms.push(("final_conv.0.block.1".to_owned(), narrow));
    layer("final_conv.1", &[ACTION, narrow, 1]);
    for (name, channels) in norms {
        add(format!("{name}.weight"), &[channels], 1.0);
        add(format!("{name}.bias"), &[channels], 0.0);
    }
    if each {
        let first = tensors.iter_mut().find(|t| t.0.ends_with("step_encoder.1.weight"));
        let (_, shape, matrix) = first.expect("it was added");
        *shape = vec![4 * EMBEDDING, HORIZON * EMBEDDING];
        let rows = matrix.chunks_exact(EMBEDDING);
        let shared = |row: &[f32]| row.iter().map(|v| v / HORIZON as f32).collect::<Vec<_>>();
        *matrix = rows.flat_map(|row| shared(row).repeat(HORIZON)).collect();
    }
    let other = fixtures().join("diffusion_transformer/causal");
    let encoder = Case::open(&other.join("model.safetensors")).0.into_iter();
    let encoder = encoder.filter(|(name, _)| !name.contains(".transformer."));
    tensors.extend(encoder.map(|(name, tensor)| (name, tensor.shape, tensor.values)));
    let bytes = tensors.iter().map(|(name, shape, v)| {
        (name, shape.clone(), v.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>())
    });
    let bytes: Vec<_> = bytes.collect();
    let views = bytes.iter().map(|(name, shape, data)| {
        (name, TensorView::new(Dtype::F32, shape.clone(), data).expect("the shape fits"))
    });
    let file = serialize(views, None).expect("they fit");
    std::fs::write(folder.join("model.safetensors"), file).expect("there is room");
    let text = std::fs::read_to_string(other.join("config.json")).expect("it is there");
    let mut config: serde_json::Value = serde_json::from_str(&text).expect("it is JSON");
    for (key, value) in [
        ("denoiser", json!("unet")),
        ("n_obs_steps", json!(OBSERVED)),
        ("horizon", json!(HORIZON)),
        ("n_action_steps", json!(TAKEN)),
        ("down_dims", json!(LEVELS)),
        ("kernel_size", json!(KERNEL)),
        ("n_groups", json!(4)),
        ("diffusion_step_embed_dim", json!(EMBEDDING)),
        ("num_train_timesteps", json!(STEPS)),
        ("num_inference_steps", json!(STEPS)),
        ("per_element_timesteps", json!(each)),
    ] {
        config[key] = value;
    }
    std::fs::write(folder.join("config.json"), config.to_string()).expect("there is room");
    for name in ["policy_preprocessor.json", "policy_postprocessor.json"] {
        let text = std::fs::read(other.join(name)).expect("it is there");
        std::fs::write(folder.join(name), text).expect("there is room");
    }
}

fn made(each: bool) -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a temporary folder");
    checkpoint(folder.path(), each);
    folder
}

fn options(streaming: bool) -> LoadOptions {
    LoadOptions { action_rate_hz: Some(10.0), streaming, ..LoadOptions::default() }
}

fn load(folder: &Path, streaming: bool) -> Box<dyn Policy> {
    load_policy(folder, &options(streaming)).unwrap_or_else(|e| panic!("{e}"))
}

/// What is seen at action `at` of a run.
fn observation(at: u64, instruction: &str) -> Observation {
    let case = fixtures().join("diffusion_transformer/causal/case.safetensors");
    let seen = Case::open(&case).observation_at(&format!("raw.{}.", at % 3), instruction);
    Observation { instant: Stamp(0) + std::time::Duration::from_millis(100 * at), ..seen }
}

fn request(seed: u64) -> ChunkRequest {
    ChunkRequest { seed, ..ChunkRequest::default() }
}

fn chunk(policy: &mut dyn Policy, at: u64) -> ActionChunk {
    inference::run(policy, &observation(at, "go"), &request(at)).unwrap_or_else(|e| panic!("{e}"))
}

fn rolling(chunk: &ActionChunk) -> CacheUse {
    let used = chunk.report.caches.iter().find(|c| c.0 == "rolling_buffer");
    used.expect("it has a buffer").1
}

#[test]
fn with_equal_timesteps_a_network_of_many_is_that_of_one() {
    let (one, many) = (made(false), made(true));
    let model = |folder: &tempfile::TempDir| {
        let checkpoint = Checkpoint::open(folder.path(), true).unwrap_or_else(|e| panic!("{e}"));
        DiffusionModel::load(&checkpoint).unwrap_or_else(|e| panic!("{e}"))
    };
    let (one, many) = (model(&one), model(&many));
    let matrix = |seed, shape: (usize, usize)| {
        Matrix::new(&gaussian_noise(seed, shape.0 * shape.1), shape).expect("it fits")
    };
    let x = matrix(100, (HORIZON, ACTION));
    let condition = Condition::new(matrix(101, (OBSERVED, SEEN)));
    let said = |model: &DiffusionModel, times: &[usize]| {
        let mut off = Branches::off();
        model.predict_with(&x, times, &condition, &mut off).map(|out| out.values().to_vec())
    };
    for t in [0, 7, 19] {
        let expected = said(&one, &[t]).expect("it fits");
        for times in [vec![t], vec![t; HORIZON]] {
            let off = max_difference(&said(&many, &times).expect("it fits"), &expected);
            assert!(off < 1e-5, "{t}: {off}");
        }
    }
    let mut times = vec![19; HORIZON];
    let (before, flat) = (said(&many, &times), said(&many, &[3]));
    times[..6].fill(3);
    let between = said(&many, &times).expect("it fits");
    for other in [before, flat] {
        assert!(max_difference(&between, &other.expect("it fits")) > 1e-4, "each of them counts");
    }
    assert!(said(&one, &times).is_err() && said(&many, &times[1..]).is_err());
}

#[test]
fn the_buffer_goes_on_from_chunk_to_chunk() {
    let folder = made(true);
    let (mut plain, mut policy) = (load(folder.path(), false), load(folder.path(), true));
    assert_eq!(plain.spec().denoise_steps, STEPS);
    assert_eq!(policy.spec().denoise_steps, STEPS / PARTS);
    let first = chunk(policy.as_mut(), 0);
    assert_eq!(first.values(), chunk(plain.as_mut(), 0).values(), "denoised from noise");
    let used = rolling(&first);
    assert_eq!((used.lookups, used.hits, used.unused), (STEPS as u32, 0, Some(Unused::Fresh)));
    let mut newest = first;
    for at in [5, 10, 12, 17] {
        let next = chunk(policy.as_mut(), at);
        assert_eq!((next.horizon(), next.report.denoise_steps), (TAKEN, STEPS / PARTS), "{at}");
        let used = rolling(&next);
        assert_eq!((used.lookups, used.hits, used.unused), (20, 10, None));
        assert!(!used.saved.is_zero());
        assert_ne!(next.values(), newest.values());
        newest = next;
    }
    let asked = ChunkRequest { denoise_steps: Some(5), ..request(22) };
    let fewer = inference::run(policy.as_mut(), &observation(22, "go"), &asked).expect("it runs");
    assert_eq!(fewer.report.denoise_steps, 10, "another number of levels begins afresh");
    let asked = ChunkRequest { denoise_steps: Some(5), ..request(24) };
    let fewer = inference::run(policy.as_mut(), &observation(24, "go"), &asked).expect("it runs");
    assert_eq!((fewer.report.denoise_steps, rolling(&fewer).hits), (5, 5));
}

#[test]
fn the_buffer_is_cleared_when_what_it_holds_is_of_no_use() {
    let folder = made(true);
    let fresh = |at: u64, instruction: &str, before: &mut dyn FnMut(&mut dyn Policy)| {
        let mut policy = load(folder.path(), true);
        chunk(policy.as_mut(), 0);
        before(policy.as_mut());
        let seen = observation(at, instruction);
        inference::run(policy.as_mut(), &seen, &request(at)).expect("it runs")
    };
    let unused = |chunk: &ActionChunk| (rolling(chunk).hits, rolling(chunk).unused);
    assert_eq!(unused(&fresh(5, "go", &mut |_| {})), (10, None));
    assert_eq!(unused(&fresh(5, "stop", &mut |_| {})), (0, Some(Unused::Changed)));
    assert_eq!(unused(&fresh(6, "go", &mut |_| {})), (0, Some(Unused::Fresh)));
    let forgotten = fresh(5, "go", &mut |policy| policy.forget());
    assert_eq!(unused(&forgotten), (0, Some(Unused::Fresh)));

    // An exact chunk is that of a policy without a buffer; the next goes on from it.
    let mut policy = load(folder.path(), true);
    chunk(policy.as_mut(), 0);
    let exact = ChunkRequest { exact: true, ..request(5) };
    let made = inference::run(policy.as_mut(), &observation(5, "go"), &exact).expect("it runs");
    assert_eq!(unused(&made), (0, Some(Unused::Exact)));
    let mut plain = load(folder.path(), false);
    chunk(plain.as_mut(), 0);
    assert_eq!(made.values(), chunk(plain.as_mut(), 5).values());
    assert_eq!(unused(&chunk(policy.as_mut(), 10)), (10, None));
}

#[test]
fn a_dropped_inference_leaves_the_buffer_as_it_was() {
    let folder = made(true);
    let mut chunks = Vec::new();
    for dropped in [false, true] {
        let mut policy = load(folder.path(), true);
        chunk(policy.as_mut(), 0);
        if dropped {
            policy.begin(&observation(3, "go"), &request(3)).expect("it fits");
            for _ in 0..4 {
                assert_ne!(policy.advance().expect("it runs"), Progress::Done);
            }
            assert_eq!(policy.finish_early(), Ok(false), "noise is no action");
            assert_eq!(policy.set_denoise_steps(3), Ok(false));
        } else {
            // The history has seen the same.
            policy.remember(&observation(3, "go")).expect("it fits");
        }
        chunks.push(chunk(policy.as_mut(), 5));
    }
    assert_eq!(chunks[0].values(), chunks[1].values());
}

#[test]
fn it_is_refused_where_it_does_not_fit() {
    let (one, many) = (made(false), made(true));
    let said = |path: &Path, caches: CacheOptions| {
        let options = LoadOptions { caches, ..options(true) };
        load_policy(path, &options).err().expect("it is refused")
    };
    let error = said(one.path(), CacheOptions::default());
    assert!(matches!(error, ModelError::NoCache { cache: "streaming", .. }), "{error}");
    assert!(error.to_string().contains("`per_element_timesteps`"), "{error}");
    for name in ["reference/oft", "onnx/flow", "smolvla_tiny"] {
        let error = said(&fixtures().join(name), CacheOptions::default()).to_string();
        assert!(error.contains("no rolling buffer; leave `streaming` out"), "{error}");
    }
    let denoiser = DenoiserCache::File("policy.cache.json".into());
    let warm_start = Some(vec![ActionKind::Position; ACTION]);
    for (caches, key) in [
        (CacheOptions { denoiser, ..CacheOptions::default() }, "`cache_denoiser`"),
        (CacheOptions { warm_start, ..CacheOptions::default() }, "`cache_warm_start`"),
    ] {
        let error = said(many.path(), caches).to_string();
        assert!(error.contains("with `streaming`") && error.contains(key), "{error}");
    }
    let config = many.path().join("config.json");
    let text = std::fs::read_to_string(&config).expect("it was written");
    let fails = |text: String| {
        std::fs::write(&config, text).expect("there is room");
        said(many.path(), CacheOptions::default()).to_string()
    };
    let transformer = fails(text.replace("\"unet\"", "\"transformer\""));
    assert!(transformer.contains("`per_element_timesteps`"), "{transformer}");
    let few = fails(text.replace("\"num_inference_steps\":20", "\"num_inference_steps\":1"));
    assert!(few.contains("`num_inference_steps`") && few.contains("2 chunks"), "{few}");
    // The weights say what they are, too.
    let scalar = fails(text.replace("\"per_element_timesteps\":true", "\"other\":0"));
    assert!(scalar.contains("per_element_timesteps") || scalar.contains("shape"), "{scalar}");

    std::fs::write(&config, text).expect("there is room");
    let mut policy = load(many.path(), true);
    let usage = PrefixUse::Guided { schedule: MaskSchedule::Ones, max_weight: 1.0 };
    let (actions, dim) = (vec![0.0; ACTION], ACTION);
    let prefix = Prefix { actions, dim, frozen: 1, horizon: 1, usage };
    let planned = ChunkRequest { prefix: Some(prefix), ..request(0) };
    let error = policy.begin(&observation(0, "go"), &planned);
    assert!(matches!(error, Err(PolicyError::Unsupported(_))), "{error:?}");
    assert!(!policy.spec().prefix.guided && !policy.spec().prefix.warm_start);
}
