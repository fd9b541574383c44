//! π0, π0.5 and π0-FAST with random weights.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::tensors::{self, Tensor};
use super::{JOINTS, STATE, feature, info, norm_map, tokenizer, write_json, write_processors};
use crate::ModelError;
use crate::checkpoint::open_without_weights;
use crate::families::Family;
use crate::pi::{PI0_FAST, PI05, PiConfig, PiSizes};
use crate::random::SplitMix64;

/// Tokens of the published text model.
const VOCABULARY: usize = 257_152;

/// Folder of the action tokenizer (π0-FAST).
const ACTION_TOKENIZER: &str = "action_tokenizer";

/// Writes the folder `out` of a policy of `family` without its weights; what these are to be.
pub fn write(
    family: &'static Family,
    full: bool,
    random: &mut SplitMix64,
    out: &Path,
) -> Result<Vec<Tensor>, ModelError> {
    std::fs::create_dir_all(out).map_err(|e| ModelError::io(out, e))?;
    let words = tokenizer::byte_level().with_begin("<bos>");
    let fast = family.name == PI0_FAST.name;
    let (prompt, length) = match family.name {
        name if name == PI05.name => ("pi05_prepare_state_tokenizer_processor_step", 200),
        _ if fast => ("pi0_fast_prepare_state_tokenizer_processor_step", 200),
        _ => ("pi0_new_line_processor", 48),
    };
    let config = config(family, full, length);
    write_json(&out.join("config.json"), &config)?;
    write_json(&out.join("tokenizer.json"), &words.json)?;
    write_json(&out.join("sinew.json"), &info())?;
    if !full {
        write_json(&out.join("dims.json"), &dims())?;
    }
    if fast {
        let folder = out.join(ACTION_TOKENIZER);
        std::fs::create_dir_all(&folder).map_err(|e| ModelError::io(&folder, e))?;
        let settings = json!({ "scale": 10, "min_token": -64, "vocab_size": 256 });
        write_json(&folder.join("processor_config.json"), &settings)?;
        write_json(&folder.join("tokenizer.json"), &tokenizer::bytes())?;
    }
    write_processors(out, &config, &[prompt], ("google/paligemma-3b-pt-224", length), random)?;
    let checkpoint = open_without_weights(out)?;
    let (parsed, sizes) = (PiConfig::of(&checkpoint)?, PiSizes::of(&checkpoint, !fast)?);
    let vocabulary = if full { VOCABULARY } else { words.size };
    Ok(tensors::pi(family, &parsed, &sizes, vocabulary))
}

fn config(family: &Family, full: bool, prompt: usize) -> Value {
    let cameras: &[&str] = match full {
        true => &["base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb"],
        false => &["camera1", "camera2"],
    };
    let mut inputs = Map::new();
    inputs.insert(STATE.into(), feature("STATE", &[JOINTS.len()]));
    for camera in cameras {
        let shape: &[usize] = if full { &[3, 224, 224] } else { &[3, 48, 64] };
        inputs.insert(format!("observation.images.{camera}"), feature("VISUAL", shape));
    }
    let (chunk, steps, side) = if full { (50, 10, 224) } else { (8, 4, 56) };
    json!({
        "type": family.name,
        "n_obs_steps": 1,
        "chunk_size": chunk,
        "n_action_steps": chunk,
        "normalization_mapping": norm_map(),
        "input_features": inputs,
        "output_features": { "action": feature("ACTION", &[JOINTS.len()]) },
        "paligemma_variant": "gemma_2b",
        "action_expert_variant": "gemma_300m",
        "dtype": "float32",
        "max_state_dim": 32,
        "max_action_dim": 32,
        "num_inference_steps": steps,
        "min_period": 0.004,
        "max_period": 4.0,
        "image_resolution": [side, side],
        "empty_cameras": 0,
        "tokenizer_max_length": prompt,
        "action_tokenizer_name": ACTION_TOKENIZER,
        "max_decoding_steps": if full { 256 } else { 24 },
        "fast_skip_tokens": 2,
    })
}

fn dims() -> Value {
    let gemma = |width: usize, mlp: usize| {
        json!({ "width": width, "depth": 2, "mlp_dim": mlp, "num_heads": 4, "num_kv_heads": 1,
                "head_dim": 16 })
    };
    json!({
        "paligemma": gemma(64, 128),
        "expert": gemma(32, 64),
        "vision": { "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
                    "intermediate_size": 64, "patch_size": 14 }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pi::PI0;

    #[test]
    fn the_full_sizes_are_those_of_the_reference() {
        for (family, count, values) in [(&PI0, 778, 4_028_019_472), (&PI05, 813, 4_143_404_816)] {
            let folder = tempfile::tempdir().expect("a temporary folder");
            let all = write(family, true, &mut SplitMix64::new(1), folder.path());
            let all = all.expect("a temporary folder can be written");
            assert_eq!(all.len(), count, "{}", family.name);
            assert_eq!(all.iter().map(Tensor::values).sum::<usize>(), values, "{}", family.name);
            let mut names: Vec<_> = all.iter().map(|t| family.short_name(&t.name)).collect();
            names.dedup();
            assert!(names.len() == count && names.iter().all(|name| name.len() < 64));
        }
    }
}
