//! `sinew model …`: makes, converts and compares policies.

use sinew_models::onnx::OnnxOptions;
use sinew_models::{LayerSensitivity, QuantType, QuantizationError, RandomSize, Supported};

use crate::cli::{Failure, Kind, ModelVerb, Size, print_json, say};

/// Does what `verb` says.
///
/// # Errors
/// [`Failure::Model`], or [`Failure::Result`] when a comparison exceeds its bound.
pub fn run(verb: ModelVerb) -> Result<(), Failure> {
    match verb {
        ModelVerb::Inspect { path, .. } if path.extension().is_some_and(|e| e == "onnx") => {
            say!("{}", sinew_models::onnx::template(&path, &OnnxOptions::default())?.trim_end());
            Ok(())
        }
        ModelVerb::Inspect { path, json } => match sinew_models::onnx::manifest_of(&path) {
            Some(manifest) => show(&sinew_models::onnx::inspect(&manifest)?, json),
            None => show(&sinew_models::inspect(&path)?, json),
        },
        ModelVerb::List { json } => {
            let list = sinew_models::supported();
            if json { print_json(&list) } else { support_table(&list) }
        }
        ModelVerb::Verify { path, compute, against, cases, seed, max_mean_error, json } => {
            let report = sinew_models::verify(&path, compute, &against, cases, seed)?;
            show(&report, json)?;
            match max_mean_error {
                Some(most) if report.mean_relative > most => Err(Failure::Result(format!(
                    "the mean action error is {:.4} of the action range, {most} is allowed",
                    report.mean_relative
                ))),
                _ => Ok(()),
            }
        }
        ModelVerb::Errors { folders, cases, seed, scratch, json } => {
            let scratch = scratch.unwrap_or_else(std::env::temp_dir);
            let rows = sinew_models::quantization_errors(&folders, &scratch, cases, seed)?;
            if json { print_json(&rows) } else { error_table(&rows) }
        }
        ModelVerb::Sensitivity { folder, kind, compute, cases, seed, scratch, json } => {
            let scratch = scratch.unwrap_or_else(std::env::temp_dir);
            let mut progress = |layers: &str, index: usize, count: usize| {
                eprintln!("{index} of {count}: {layers}");
            };
            let rows = sinew_models::sensitivity(
                &folder,
                stored(kind),
                compute,
                &scratch,
                (cases, seed),
                &mut progress,
            )?;
            if json { print_json(&rows) } else { sensitivity_table(&rows) }
        }
        ModelVerb::Quantize { folder, kind, output } => {
            eprintln!("reading {} …", folder.display());
            sinew_models::quantize(&folder, stored(kind), &output)?;
            show(&sinew_models::inspect(&output)?, false)
        }
        ModelVerb::Random { architecture, size, seed, output } => {
            let size = match size {
                Size::Full => RandomSize::Full,
                Size::Tiny => RandomSize::Tiny,
            };
            sinew_models::random(&architecture, size, seed, &output)?;
            say!("{}", output.display());
            Ok(())
        }
        ModelVerb::Fetch { repository, output } => {
            sinew_models::fetch(&repository, &output)?;
            say!("{}", output.display());
            Ok(())
        }
    }
}

fn support_table(list: &[Supported]) -> Result<(), Failure> {
    say!("| architecture | backbone | head | bundles | strategies | caches | proof |");
    say!("| --- | --- | --- | --- | --- | --- | --- |");
    for line in list {
        let extra: String = line.strategies.iter().map(|s| format!(", {s}")).collect();
        say!(
            "| {} | {} | {} | {} | all{} | {} | {} |",
            line.architecture,
            line.backbone,
            line.head,
            line.quantization.join(" "),
            if extra.is_empty() { " but rtc".to_owned() } else { format!(" plain{extra}") },
            line.caches.join(" "),
            line.proof
        );
    }
    say!(
        "| onnx | any exported network | its own, or flow matching in two files | none | all plain, rtc-guided | | recorded outputs |"
    );
    Ok(())
}

/// Errors are in the action's own unit (rad, m).
fn error_table(rows: &[QuantizationError]) -> Result<(), Failure> {
    say!(
        "| architecture | checkpoint | type | computed | smaller | mean | p99 | max | mean of range |"
    );
    say!("| --- | --- | --- | --- | --- | --- | --- | --- | --- |");
    for row in rows {
        let folder = row.checkpoint.display();
        say!(
            "| {} | {folder} | {} | {} | {:.1} x | {:.5} | {:.5} | {:.5} | {:.5} |",
            row.architecture,
            row.quantization,
            row.compute.name(),
            row.smaller,
            row.mean,
            row.p99,
            row.max,
            row.mean_relative
        );
    }
    Ok(())
}

fn stored(kind: Kind) -> QuantType {
    match kind {
        Kind::Q8_0 => QuantType::Q8_0,
        Kind::Q4_0 => QuantType::Q4_0,
        Kind::Q4K => QuantType::Q4K,
        Kind::F16 => QuantType::F16,
    }
}

fn sensitivity_table(rows: &[LayerSensitivity]) -> Result<(), Failure> {
    say!("| layers | weights | mean of range | p99 | max |");
    say!("| --- | --- | --- | --- | --- |");
    for row in rows {
        say!(
            "| {} | {:.1} % | {:.3} % | {:.3} % | {:.3} % |",
            row.layers,
            row.weights * 100.0,
            row.mean_relative * 100.0,
            row.p99_relative * 100.0,
            row.max_relative * 100.0
        );
    }
    Ok(())
}

/// Prints `value` as JSON, or as indented text.
fn show<T: serde::Serialize>(value: &T, json: bool) -> Result<(), Failure> {
    if json {
        return print_json(value);
    }
    let value = serde_json::to_value(value).map_err(|e| Failure::Result(e.to_string()))?;
    print_value(&value, 0);
    Ok(())
}

/// Longer lists are cut in text; JSON has them whole.
const LISTED: usize = 8;

fn print_value(value: &serde_json::Value, depth: usize) {
    use serde_json::Value;
    let pad = "  ".repeat(depth);
    let plain = |v: &Value| match v {
        Value::String(text) => text.clone(),
        Value::Number(n) if n.is_f64() => format!("{:.6}", n.as_f64().unwrap_or(f64::NAN)),
        other => other.to_string(),
    };
    match value {
        Value::Object(map) => {
            for (key, inner) in map {
                match inner {
                    Value::Object(_) => {
                        say!("{pad}{key}:");
                        print_value(inner, depth + 1);
                    }
                    Value::Array(list) if list.iter().any(|v| v.is_object() || v.is_array()) => {
                        say!("{pad}{key}:");
                        list.iter().for_each(|v| print_value(v, depth + 1));
                    }
                    Value::Array(list) => {
                        let shown: Vec<_> = list.iter().take(LISTED).map(plain).collect();
                        let rest = list.len() - shown.len();
                        let more =
                            if rest > 0 { format!(" … and {rest} more") } else { String::new() };
                        say!("{pad}{key}: {}{more}", shown.join(", "));
                    }
                    plain_value => say!("{pad}{key}: {}", plain(plain_value)),
                }
            }
        }
        Value::Array(list) => {
            let row: Vec<_> = list.iter().map(plain).collect();
            say!("{pad}{}", row.join("  "));
        }
        other => say!("{pad}{}", plain(other)),
    }
}
