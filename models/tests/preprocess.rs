//! Same inputs as LeRobot 0.6.1? Resizing, normalisation, tokenizers.

mod common;

use std::path::Path;

use common::{Case, max_difference, normalizer, reference};
use sinew_models::processors::{NormMode, Prompter, crop, resize};

#[test]
fn resizing_with_padding_matches_lerobot() {
    let Some(dir) = reference("preprocess") else { return };
    let case = Case::open(&dir.join("case_resize.safetensors"));
    for index in 0..7 {
        let image = case.get(&format!("{index}.image_u8"));
        let expected = case.get(&format!("{index}.left_top"));
        let from = (image.shape[1], image.shape[0]);
        let to = (expected.shape[3], expected.shape[2]);
        let ours = resize::resize_with_pad(resize::to_planes(&image.bytes, from), to);
        let difference = max_difference(ours.values.values(), &expected.values);
        assert!(difference < 1e-5, "case {index} differs by {difference:e}");
    }
}

#[test]
fn smooth_resizing_and_cropping_match_torchvision() {
    let Some(dir) = reference("preprocess") else { return };
    let case = Case::open(&dir.join("case_resize.safetensors"));
    let mut worst: f32 = 0.0;
    for index in 0..7 {
        let image = case.get(&format!("{index}.image_u8"));
        let from = (image.shape[1], image.shape[0]);
        let planes = resize::to_planes(&image.bytes, from);
        let size = |t: &common::Recorded| (t.shape[3], t.shape[2]);
        let expected = case.get(&format!("{index}.antialias"));
        let ours = crop::resize_smooth(planes.clone(), size(expected));
        worst = worst.max(max_difference(ours.values.values(), &expected.values));
        let expected = case.get(&format!("{index}.center_crop"));
        let ours = crop::center_crop(&planes, size(expected)).expect("it is smaller");
        assert_eq!(max_difference(ours.values.values(), &expected.values), 0.0, "crop {index}");
    }
    println!("antialias: {worst:.1e}");
    assert!(worst < 1e-6, "differs by {worst:e}");
}

#[test]
fn every_normalisation_matches_lerobot() {
    let Some(dir) = reference("preprocess") else { return };
    let case = Case::open(&dir.join("case_normalize.safetensors"));
    for name in ["IDENTITY", "MEAN_STD", "MIN_MAX", "QUANTILES", "QUANTILE10"] {
        let mode = NormMode::from_name(name).expect("all five are known");
        for key in ["action", "observation.state", "observation.images.cam"] {
            let input = case.get(&format!("in.{key}"));
            let expected = case.get(&format!("{name}.normalized.{key}"));
            let visual = key.contains("images");
            let (width, inner) =
                if visual { (3, 48) } else { (*input.shape.last().expect("a width"), 1) };
            let n = normalizer(&case, mode, key, width);
            for (i, (x, e)) in input.values.iter().zip(&expected.values).enumerate() {
                let ours = n.normalize(i / inner % width, *x);
                // Dimension 2 never moves: dividing by 1e-8 makes values of 1e8.
                assert!(
                    (ours - e).abs() <= 1e-5 * e.abs().max(1.0),
                    "{name} {key} {i}: {ours} {e}"
                );
            }
            if key == "action" {
                let back = case.get(&format!("{name}.unnormalized.action"));
                for (i, (x, e)) in input.values.iter().zip(&back.values).enumerate() {
                    let ours = n.unnormalize(i % width, f64::from(*x));
                    let e = f64::from(*e);
                    assert!(
                        (ours - e).abs() <= 1e-5 * e.abs().max(1.0),
                        "{name} back {i}: {ours} {e}"
                    );
                }
            }
        }
    }
}

#[test]
fn tokens_match_transformers() {
    let Some(dir) = reference("preprocess") else { return };
    let text = std::fs::read_to_string(dir.join("tokenizer_cases.json")).expect("it is there");
    let cases: serde_json::Value = serde_json::from_str(&text).expect("it is JSON");
    let texts = cases["texts"].as_array().expect("a list of texts");
    for name in ["tokenizer_bytelevel", "tokenizer_byte_fallback"] {
        let json = std::fs::read(dir.join(name).join("tokenizer.json")).expect("it is there");
        for (limit, ids) in
            [(usize::MAX, &cases[name]), (24, &cases["padded_to_24"][name]["input_ids"])]
        {
            let mask = &cases["padded_to_24"][name]["attention_mask"];
            let limit = limit.min(1 << 20);
            let mut prompter =
                Prompter::new(Path::new(name), &json, limit, false).expect("it loads");
            for (i, text) in texts.iter().enumerate() {
                let expected: Vec<u32> = ids[i]
                    .as_array()
                    .expect("ids")
                    .iter()
                    .enumerate()
                    .filter(|(k, _)| limit != 24 || mask[i][k] == 1 || mask[i][k] == true)
                    .map(|(_, id)| id.as_u64().expect("an id") as u32)
                    .collect();
                let ours = prompter.encode(text.as_str().expect("a text")).expect("it encodes");
                assert_eq!(ours, expected, "{name} {text}");
            }
        }
    }
}
