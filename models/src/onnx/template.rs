//! A manifest to begin with, from what an ONNX file says of itself.

use std::fmt::Write;
use std::path::Path;

use super::graph::{Element, OnnxOptions, Port, open_graph};
use crate::ModelError;

/// What an input looks like.
enum Guess {
    /// Width, height (where fixed), channels first.
    Image {
        size: Option<(usize, usize)>,
        first: bool,
    },
    Tokens,
    Mask,
    Noise,
    /// The output that has the same shape and nearly the same name.
    Recurrent(String),
    State(usize),
    Nothing,
}

/// A manifest for the ONNX file `path`, to be completed by hand: names, units and normalisation are not in
/// the file. Its inputs and outputs stand in comments at the top.
///
/// # Errors
/// [`ModelError::Onnx`] when the file cannot be loaded.
pub fn template(path: &Path, options: &OnnxOptions) -> Result<String, ModelError> {
    let graph = open_graph(path, options)?;
    let (inputs, outputs) = (graph.inputs(), graph.outputs());
    let file =
        path.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
    let mut text = format!("# Save as {} beside {file}, and complete it.\n", super::MANIFEST);
    for (kind, ports) in [("input ", inputs), ("output", outputs)] {
        for port in ports {
            let _ = writeln!(text, "# {kind} {}: {port}", quoted(&port.name));
        }
    }
    let _ =
        write!(text, "\nmodel = {}\naction_rate = \"30 Hz\"    # as in training\n", quoted(&file));
    let guesses: Vec<_> = inputs.iter().map(|port| guess(port, outputs)).collect();
    let mask = inputs.iter().zip(&guesses).find(|(_, guess)| matches!(guess, Guess::Mask));
    let mask = mask.map(|(port, _)| port.name.as_str());
    let mut seen_state = false;
    for (port, guess) in inputs.iter().zip(&guesses) {
        let name = quoted(&port.name);
        let _ = match guess {
            Guess::State(width) if !seen_state => {
                seen_state = true;
                write!(
                    text,
                    "\n[state]\ninput = {name}\nnames = {}    # the arm's joints, in its order\n\
                     units = \"rad\"         # rad | deg | anything else passes unchanged\n\
                     normalization = {{ mode = \"none\" }}    # or mean_std (mean, std), min_max (min, max), …\n",
                    names(*width)
                )
            }
            Guess::Image { size, first } => image(&mut text, port, *size, *first),
            Guess::Tokens => {
                let mask = mask.map_or(String::new(), |mask| format!("mask = {}\n", quoted(mask)));
                let fixed = port.shape.as_ref().and_then(|shape| *shape.last()?).is_some();
                let length =
                    if fixed { "" } else { "length = 48          # longest instruction\n" };
                write!(
                    text,
                    "\n[instruction]\ninput = {name}\n{mask}tokenizer = \"tokenizer.json\"    # beside this file\n\
                     {length}pad_token = 0\nappend_newline = false\n"
                )
            }
            Guess::Noise => write!(text, "\n[noise]\ninput = {name}\n"),
            Guess::Recurrent(output) => {
                write!(text, "\n[[recurrent]]\ninput = {name}\noutput = {}\n", quoted(output))
            }
            Guess::Mask if guesses.iter().any(|g| matches!(g, Guess::Tokens)) => Ok(()),
            _ => writeln!(text, "\n# Nothing feeds the input {name} ({port}) yet."),
        };
    }
    actions(&mut text, outputs, &guesses);
    Ok(text)
}

fn image(
    text: &mut String,
    port: &Port,
    size: Option<(usize, usize)>,
    first: bool,
) -> std::fmt::Result {
    let camera = port.name.rsplit(['.', '/']).next().unwrap_or(&port.name);
    let layout = if first { "nchw" } else { "nhwc" };
    let range = if port.element == Element::Uint8 { "0..255" } else { "0..1" };
    write!(
        text,
        "\n[images.{}]\ninput = {}\nlayout = \"{layout}\"\n",
        quoted(camera),
        quoted(&port.name)
    )?;
    if size.is_none() {
        writeln!(text, "size = [224, 224]    # width, height")?;
    }
    write!(
        text,
        "colors = \"rgb\"\nrange = \"{range}\"       # 0..1 | -1..1 | 0..255\nfit = \"stretch\"      # stretch | \
         pad-left-top | exact\nnormalization = {{ mode = \"none\" }}\n"
    )
}

fn actions(text: &mut String, outputs: &[Port], guesses: &[Guess]) {
    let recurrent = |port: &&Port| {
        !guesses.iter().any(|guess| matches!(guess, Guess::Recurrent(name) if *name == port.name))
    };
    let float = |port: &&Port| matches!(port.element, Element::Float32 | Element::Unknown);
    let Some(port) = outputs.iter().filter(recurrent).find(float) else { return };
    let shape = port.shape.clone().unwrap_or_default();
    let width = shape.last().copied().flatten().unwrap_or(6);
    let _ = write!(
        text,
        "\n[action]\noutput = {}\nnames = {}\nunits = \"rad\"\n",
        quoted(&port.name),
        names(width)
    );
    let free = shape.len() >= 2 && shape[shape.len() - 2].is_none();
    if free || shape.is_empty() {
        let _ = writeln!(text, "horizon = 16         # actions in a chunk");
    }
    let _ = writeln!(text, "normalization = {{ mode = \"none\" }}");
}

fn guess(port: &Port, outputs: &[Port]) -> Guess {
    let lower = port.name.to_lowercase();
    let shape = port.shape.clone().unwrap_or_default();
    let n = shape.len();
    let named = |words: &[&str]| words.iter().any(|word| lower.contains(word));
    if named(&["mask"]) && n <= 2 {
        return Guess::Mask;
    }
    match port.element {
        Element::Int64 | Element::Int32 => return Guess::Tokens,
        Element::Bool => return Guess::Mask,
        Element::Other => return Guess::Nothing,
        _ => {}
    }
    if n >= 3 && (shape[n - 3] == Some(3) || shape[n - 1] == Some(3)) {
        let first = shape[n - 3] == Some(3);
        let (height, width) =
            if first { (shape[n - 2], shape[n - 1]) } else { (shape[n - 3], shape[n - 2]) };
        return Guess::Image { size: width.zip(height), first };
    }
    if named(&["noise"]) {
        return Guess::Noise;
    }
    let next = outputs.iter().find(|output| {
        output.shape == port.shape
            && output.name != port.name
            && output.name.starts_with(&port.name)
    });
    match (next, shape.last()) {
        (Some(output), _) => Guess::Recurrent(output.name.clone()),
        (None, Some(Some(width))) if *width <= 256 => Guess::State(*width),
        _ => Guess::Nothing,
    }
}

fn names(width: usize) -> String {
    let names: Vec<_> = (1..=width).map(|i| format!("\"joint{i}\"")).collect();
    format!("[{}]", names.join(", "))
}

/// `text` as a TOML string or quoted key.
fn quoted(text: &str) -> String {
    toml::Value::String(text.to_owned()).to_string()
}
