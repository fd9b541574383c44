//! Checkpoints with seeded random weights: for tests, and for measuring without a download.
//!
//! What is written is a LeRobot folder like any other: `config.json`, `model.safetensors`, both pipelines with
//! their statistics, and a tokenizer; or the bundle that would be made of it.

mod pi;
mod tensors;
mod tokenizer;

use std::fs::File;
use std::io::{BufWriter, Write};
use std::ops::Range;
use std::path::Path;

use serde_json::{Value, json};

use crate::ModelError;
use crate::checkpoint::{Features, StoredType, open_without_weights};
use crate::families::Family;
use crate::gguf::{QuantType, Weights, blocks, write_bundle};
use crate::random::SplitMix64;
use crate::smolvla::{SMOLVLM2_500M, SMOLVLM2_500M_CONFIG, SmolVlaConfig, VlmConfig};
use tensors::{Fill, Tensor};

/// Size of a random checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RandomSize {
    /// The published sizes: SmolVLA has 450 million values (1.8 GB), a π policy about 3 billion.
    Full,
    /// A few hundred thousand values, for tests.
    Tiny,
}

const STATE: &str = "observation.state";
const JOINTS: [&str; 6] =
    ["shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper"];
/// Values made and written at a time.
const SLICE: usize = 1 << 16;

/// Policies that random checkpoints can be made of, by the `type` in `config.json`.
pub const RANDOM_ARCHITECTURES: [&str; 4] = ["smolvla", "pi0", "pi05", "pi0_fast"];

/// Writes a SmolVLA checkpoint folder; see [`random`].
///
/// # Errors
/// As there.
pub fn random_smolvla(size: RandomSize, seed: u64, out: &Path) -> Result<(), ModelError> {
    random("smolvla", size, seed, out)
}

/// Writes a checkpoint of `architecture` with random weights of `seed` to `out`: a folder (made if missing), or,
/// where the name ends in `.gguf`, a bundle of type Q8_0 as [`crate::quantize`] makes it.
///
/// Weights are streamed to disk, so the memory used is small at every size. They are drawn so that
/// activations stay of order one; the actions mean nothing.
///
/// # Errors
/// [`ModelError::Io`] when a file cannot be written; [`ModelError::UnknownArchitecture`].
pub fn random(
    architecture: &str,
    size: RandomSize,
    seed: u64,
    out: &Path,
) -> Result<(), ModelError> {
    let family = crate::families::find(architecture, out)?;
    let mut random = SplitMix64::new(seed);
    if out.extension().is_none_or(|e| e != "gguf") {
        let tensors = write_all_but_weights(family, size, &mut random, out)?;
        return write_safetensors(&out.join("model.safetensors"), &tensors, &mut random);
    }
    // What a bundle holds besides weights is read from a folder.
    let folder = out.with_extension("gguf.folder");
    let written = write_all_but_weights(family, size, &mut random, &folder).and_then(|tensors| {
        let checkpoint = open_without_weights(&folder)?;
        let used = |t: &Tensor| !(family.unused)(&family.short_name(&t.name));
        let tensors: Vec<Tensor> = tensors.into_iter().filter(used).collect();
        let mut weights = Drawn { family, tensors, random: &mut random };
        write_bundle(&checkpoint, QuantType::Q8_0, None, &mut weights, out)
    });
    // Of no use any more; that it cannot be removed is no failure.
    let _ = std::fs::remove_dir_all(&folder);
    written
}

/// Weights that are drawn as they are written.
struct Drawn<'a> {
    family: &'static Family,
    tensors: Vec<Tensor>,
    random: &'a mut SplitMix64,
}

impl Weights for Drawn<'_> {
    fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let short = |t: &Tensor| (self.family.short_name(&t.name), t.shape.clone());
        self.tensors.iter().map(short).collect()
    }

    fn read(&mut self, index: usize, range: Range<usize>, out: &mut Vec<f32>) {
        self.tensors[index].fill.draw(range, self.random, out);
    }
}

/// Writes the folder `out` without its weights; what these are to be.
fn write_all_but_weights(
    family: &'static Family,
    size: RandomSize,
    random: &mut SplitMix64,
    out: &Path,
) -> Result<Vec<Tensor>, ModelError> {
    match family.name {
        "smolvla" => write_smolvla(size == RandomSize::Full, random, out),
        name if RANDOM_ARCHITECTURES.contains(&name) => {
            pi::write(family, size == RandomSize::Full, random, out)
        }
        name => {
            let (path, found) = (out.to_owned(), name.to_owned());
            Err(ModelError::UnknownArchitecture { path, found })
        }
    }
}

fn write_smolvla(
    full: bool,
    random: &mut SplitMix64,
    out: &Path,
) -> Result<Vec<Tensor>, ModelError> {
    let vocabulary = tokenizer::byte_level();
    let vlm_text = if full { SMOLVLM2_500M_CONFIG.to_owned() } else { tiny_vlm(vocabulary.size) };
    let config = config(full);
    let parsed = parse(out, &config)?;
    let vlm = VlmConfig::parse(out, &vlm_text)?;
    let vlm_folder = if full { out.to_owned() } else { out.join("vlm") };
    std::fs::create_dir_all(&vlm_folder).map_err(|e| ModelError::io(&vlm_folder, e))?;
    write_json(&out.join("config.json"), &config)?;
    if !full {
        write_text(&vlm_folder.join("config.json"), &vlm_text)?;
    }
    write_json(&vlm_folder.join("tokenizer.json"), &vocabulary.json)?;
    let prompt = ["smolvla_new_line_processor"];
    let tokenizer = (parsed.vlm_model_name.as_str(), parsed.tokenizer_max_length);
    write_processors(out, &config, &prompt, tokenizer, random)?;
    write_json(&out.join("sinew.json"), &info())?;
    Ok(tensors::smolvla(&parsed, &vlm))
}

fn info() -> Value {
    json!({
        "action_names": JOINTS, "action_units": vec!["rad"; JOINTS.len()], "action_rate_hz": 30.0
    })
}

fn parse(path: &Path, config: &Value) -> Result<SmolVlaConfig, ModelError> {
    let text = config.to_string();
    SmolVlaConfig::parse(path, &text, &Features::parse(path, &text)?)
}

fn config(full: bool) -> Value {
    let camera = if full { [3, 256, 256] } else { [3, 48, 64] };
    let (chunk, steps, layers) = if full { (50, 10, 16) } else { (8, 4, 2) };
    let side = if full { 512 } else { 64 };
    json!({
        "type": "smolvla",
        "n_obs_steps": 1,
        "chunk_size": chunk,
        "n_action_steps": chunk,
        "normalization_mapping": norm_map(),
        "input_features": {
            STATE: feature("STATE", &[JOINTS.len()]),
            "observation.images.camera1": feature("VISUAL", &camera),
            "observation.images.camera2": feature("VISUAL", &camera),
        },
        "output_features": { "action": feature("ACTION", &[JOINTS.len()]) },
        "max_state_dim": 32,
        "max_action_dim": 32,
        "resize_imgs_with_padding": [side, side],
        "empty_cameras": 0,
        "adapt_to_pi_aloha": false,
        "tokenizer_max_length": 48,
        "num_steps": steps,
        "use_cache": true,
        "vlm_model_name": if full { SMOLVLM2_500M } else { "vlm" },
        "load_vlm_weights": true,
        "add_image_special_tokens": false,
        "attention_mode": "cross_attn",
        "prefix_length": 0,
        "pad_language_to": "max_length",
        "num_expert_layers": 0,
        "num_vlm_layers": layers,
        "self_attn_every_n_layers": 2,
        "expert_width_multiplier": 0.75,
        "min_period": 0.004,
        "max_period": 4.0,
    })
}

fn feature(kind: &str, shape: &[usize]) -> Value {
    json!({ "type": kind, "shape": shape })
}

fn norm_map() -> Value {
    json!({ "VISUAL": "IDENTITY", "STATE": "MEAN_STD", "ACTION": "MEAN_STD" })
}

fn tiny_vlm(vocabulary: usize) -> String {
    let value = json!({
        "model_type": "smolvlm",
        "scale_factor": 4,
        "text_config": {
            "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
            "rms_norm_eps": 1e-5, "vocab_size": vocabulary
        },
        "vision_config": {
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 2, "image_size": 64, "patch_size": 8, "layer_norm_eps": 1e-6
        }
    });
    format!("{value:#}\n")
}

fn write_text(path: &Path, text: &str) -> Result<(), ModelError> {
    std::fs::write(path, text).map_err(|e| ModelError::io(path, e))
}

fn write_json(path: &Path, value: &Value) -> Result<(), ModelError> {
    write_text(path, &format!("{value:#}\n"))
}

/// Both pipelines, as LeRobot saves them, with statistics of made-up joints.
fn write_processors(
    out: &Path,
    json: &Value,
    prompt: &[&str],
    (tokenizer_name, max_length): (&str, usize),
    random: &mut SplitMix64,
) -> Result<(), ModelError> {
    let (pre, post) = (
        "policy_preprocessor_step_5_normalizer_processor.safetensors",
        "policy_postprocessor_step_0_unnormalizer_processor.safetensors",
    );
    let step = |name: &str, config: Value| json!({ "registry_name": name, "config": config });
    let device = || step("device_processor", json!({ "device": "cpu", "float_dtype": null }));
    let normalizer = |name: &str, features: Value, file: &str| {
        let config = json!({ "eps": 1e-8, "features": features, "norm_map": norm_map() });
        json!({ "registry_name": name, "config": config, "state_file": file })
    };
    let mut features = json["input_features"].clone();
    features["action"] = json["output_features"]["action"].clone();
    let tokenizer = json!({
        "max_length": max_length, "task_key": "task", "padding_side": "right",
        "padding": "max_length", "truncation": true, "tokenizer_name": tokenizer_name
    });
    let mut steps = vec![
        step("rename_observations_processor", json!({ "rename_map": {} })),
        step("to_batch_processor", json!({})),
    ];
    steps.extend(prompt.iter().map(|name| step(name, json!({}))));
    steps.extend([
        step("tokenizer_processor", tokenizer),
        device(),
        normalizer("normalizer_processor", features, pre),
    ]);
    let preprocessor = json!({ "name": "policy_preprocessor", "steps": steps });
    write_json(&out.join("policy_preprocessor.json"), &preprocessor)?;
    let action = json!({ "action": json["output_features"]["action"] });
    let steps = json!([normalizer("unnormalizer_processor", action, post), device()]);
    let postprocessor = json!({ "name": "policy_postprocessor", "steps": steps });
    write_json(&out.join("policy_postprocessor.json"), &postprocessor)?;
    let statistics = statistics(random);
    write_safetensors(&out.join(pre), &statistics, random)?;
    write_safetensors(&out.join(post), &statistics, random)
}

/// Statistics of joints that stay within about ±1.5 rad.
fn statistics(random: &mut SplitMix64) -> Vec<Tensor> {
    let mut all = Vec::new();
    for feature in ["action", STATE] {
        let draw = |random: &mut SplitMix64, low: f64, high: f64| -> Vec<f32> {
            JOINTS.iter().map(|_| (low + (high - low) * random.open_unit()) as f32).collect()
        };
        let (mean, std) = (draw(random, -0.3, 0.3), draw(random, 0.2, 0.5));
        let at = |deviations: f32| -> Vec<f32> {
            mean.iter().zip(&std).map(|(m, s)| m + deviations * s).collect()
        };
        let quantiles = [
            ("max", 3.0),
            ("min", -3.0),
            ("q01", -2.33),
            ("q10", -1.28),
            ("q90", 1.28),
            ("q99", 2.33),
        ];
        let mut add = |name: &str, values: Vec<f32>| {
            all.push(Tensor {
                name: format!("{feature}.{name}"),
                shape: vec![JOINTS.len()],
                fill: Fill::Values(values),
            })
        };
        for (name, deviations) in quantiles {
            add(name, at(deviations));
        }
        add("mean", mean.clone());
        add("std", std.clone());
    }
    all.sort_by(|a, b| a.name.cmp(&b.name));
    all
}

/// Writes `tensors` as F32, in order, drawing their values as they are written.
fn write_safetensors(
    path: &Path,
    tensors: &[Tensor],
    random: &mut SplitMix64,
) -> Result<(), ModelError> {
    let io = |e| ModelError::io(path, e);
    let mut header = serde_json::Map::new();
    let mut offset = 0;
    for tensor in tensors {
        let end = offset + 4 * tensor.values();
        let entry = json!({ "dtype": "F32", "shape": tensor.shape, "data_offsets": [offset, end] });
        header.insert(tensor.name.clone(), entry);
        offset = end;
    }
    let mut header = Value::Object(header).to_string();
    // The data begin at a multiple of eight, as the format asks.
    header.push_str(&" ".repeat(header.len().next_multiple_of(8) - header.len()));
    let mut file = BufWriter::new(File::create(path).map_err(io)?);
    file.write_all(&(header.len() as u64).to_le_bytes()).map_err(io)?;
    file.write_all(header.as_bytes()).map_err(io)?;
    let mut values = Vec::with_capacity(SLICE);
    let mut bytes = Vec::with_capacity(4 * SLICE);
    for tensor in tensors {
        let count = tensor.values();
        for start in (0..count).step_by(SLICE) {
            values.clear();
            bytes.clear();
            tensor.fill.draw(start..count.min(start + SLICE), random, &mut values);
            blocks::encode(StoredType::F32, &values, &mut bytes);
            file.write_all(&bytes).map_err(io)?;
        }
    }
    file.into_inner().map_err(|e| io(e.into_error())).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_full_size_is_that_of_the_published_policy() {
        let parsed = parse(Path::new("c"), &config(true));
        let vlm = VlmConfig::parse(Path::new("v"), SMOLVLM2_500M_CONFIG);
        let all = tensors::smolvla(&parsed.expect("our own"), &vlm.expect("our own"));
        assert_eq!(all.len(), 500);
        assert_eq!(all.iter().map(Tensor::values).sum::<usize>(), 450_046_176);
    }
}
