//! The manifest's names against what the ONNX file really has.
//!
//! Every difference is an error with the manifest's key and the graph's own type and shape.

use std::collections::BTreeSet;
use std::path::Path;

use super::graph::{Element, Port};
use crate::ModelError;

/// The inputs of one or two graphs, crossed off as the manifest names them.
pub(super) struct Inputs<'a> {
    manifest: &'a Path,
    ports: Vec<&'a Port>,
    fed: BTreeSet<String>,
}

impl<'a> Inputs<'a> {
    pub fn new(manifest: &'a Path, ports: impl Iterator<Item = &'a Port>) -> Self {
        Self { manifest, ports: ports.collect(), fed: BTreeSet::new() }
    }

    /// The input `name`, which the manifest's `key` gives, of one of the types `allowed`.
    ///
    /// # Errors
    /// [`ModelError::Config`] when there is none, it has another type, or is fed already.
    pub fn take(
        &mut self,
        key: &str,
        name: &str,
        allowed: &[Element],
    ) -> Result<&'a Port, ModelError> {
        let port = find(self.manifest, key, "input", name, self.ports.iter().copied())?;
        check_type(self.manifest, key, port, allowed)?;
        if !self.fed.insert(name.to_owned()) {
            let reason = format!("is `{name}`, which another key of the manifest feeds already");
            return Err(ModelError::config(self.manifest, key, reason));
        }
        Ok(port)
    }

    /// Checks that nothing is left.
    ///
    /// # Errors
    /// [`ModelError::Config`] naming the first input that nothing feeds.
    pub fn all_fed(&self) -> Result<(), ModelError> {
        let Some(left) = self.ports.iter().find(|port| !self.fed.contains(&port.name)) else {
            return Ok(());
        };
        let reason = format!(
            "feeds nothing to the model's input `{}` ({left}); say what it is: state, images.NAME, instruction, \
             noise or recurrent",
            left.name
        );
        Err(ModelError::config(self.manifest, "the file", reason))
    }
}

/// The port `name` of `ports`, which the manifest's `key` gives.
///
/// # Errors
/// [`ModelError::Config`] with the names that there are.
pub(super) fn find<'a>(
    manifest: &Path,
    key: &str,
    kind: &str,
    name: &str,
    ports: impl Iterator<Item = &'a Port> + Clone,
) -> Result<&'a Port, ModelError> {
    ports.clone().find(|port| port.name == name).ok_or_else(|| {
        let names: Vec<_> = ports.map(|port| format!("`{}` ({port})", port.name)).collect();
        let reason = format!("is `{name}`, but the model's {kind}s are {}", names.join(", "));
        ModelError::config(manifest, key, reason)
    })
}

/// Checks that `port` has one of the types `allowed`.
///
/// # Errors
/// [`ModelError::Config`] with both.
pub(super) fn check_type(
    manifest: &Path,
    key: &str,
    port: &Port,
    allowed: &[Element],
) -> Result<(), ModelError> {
    if port.element == Element::Unknown || allowed.contains(&port.element) {
        return Ok(());
    }
    let allowed: Vec<_> = allowed.iter().map(|element| format!("{element:?}")).collect();
    let reason = format!(
        "is `{}`, which is {port} in the model; {} is expected there: export it so",
        port.name,
        allowed.join(" or ")
    );
    Err(ModelError::config(manifest, key, reason))
}

/// The shape of `port` when its last sizes are `wanted` (`None`: the model's own) and all before them 1.
///
/// # Errors
/// [`ModelError::Config`] when the model contradicts, or neither says a size.
pub(super) fn fit(
    manifest: &Path,
    key: &str,
    port: &Port,
    wanted: &[Option<usize>],
) -> Result<Vec<usize>, ModelError> {
    let shown: Vec<_> =
        wanted.iter().map(|size| size.map_or("?".to_owned(), |n| n.to_string())).collect();
    let fail = |what: &str| {
        let reason = format!(
            "is `{}`, which is {port} in the model, and the manifest makes it [{}]: {what}",
            port.name,
            shown.join(", ")
        );
        ModelError::config(manifest, key, reason)
    };
    let leading = match &port.shape {
        Some(shape) => shape
            .len()
            .checked_sub(wanted.len())
            .ok_or_else(|| fail("the numbers of dimensions differ"))?,
        None => 1,
    };
    let unknown = vec![None; leading + wanted.len()];
    let own = port.shape.as_ref().unwrap_or(&unknown);
    if own[..leading].iter().any(|size| size.is_some_and(|n| n != 1)) {
        return Err(fail("the dimensions before must be 1 (one robot, one observation)"));
    }
    let mut out = vec![1; leading];
    for (own, wanted) in own[leading..].iter().zip(wanted) {
        out.push(match (own, wanted) {
            (Some(own), Some(wanted)) if own != wanted => return Err(fail("the sizes differ")),
            (Some(size), _) | (None, Some(size)) => *size,
            (None, None) => {
                return Err(fail("a size is free in the model; give it in the manifest"));
            }
        });
    }
    let count = out.iter().try_fold(1usize, |product, size| product.checked_mul(*size));
    // A quarter of a GiB of floats: more than any image or sample has.
    if count.is_none_or(|count| count == 0 || count > 1 << 26) {
        return Err(fail("that is no usable size"));
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn port(shape: &[Option<usize>]) -> Port {
        Port { name: "x".into(), element: Element::Float32, shape: Some(shape.to_vec()) }
    }

    #[test]
    fn leading_ones_and_free_sizes_are_filled_in() {
        let fit = |shape: &[Option<usize>], wanted: &[Option<usize>]| {
            fit(Path::new("m"), "state.input", &port(shape), wanted)
        };
        assert_eq!(fit(&[None, Some(6)], &[Some(6)]).ok(), Some(vec![1, 6]));
        assert_eq!(fit(&[Some(6)], &[Some(6)]).ok(), Some(vec![6]));
        assert_eq!(
            fit(&[Some(1), None, None], &[None, Some(4)]).ok(),
            None,
            "nobody says the second"
        );
        for (shape, wanted, words) in [
            (vec![Some(1), Some(7)], vec![Some(6)], "the sizes differ"),
            (vec![Some(2), Some(6)], vec![Some(6)], "must be 1"),
            (vec![Some(6)], vec![Some(3), Some(6)], "numbers of dimensions"),
            (vec![None], vec![Some(usize::MAX)], "no usable size"),
            (vec![None], vec![Some(0)], "no usable size"),
        ] {
            let error = fit(&shape, &wanted).expect_err(words).to_string();
            assert!(error.contains(words) && error.contains("state.input"), "{error}");
        }
    }

    #[test]
    fn an_input_that_nothing_feeds_is_named() {
        let ports = [port(&[Some(1)])];
        let mut inputs = Inputs::new(Path::new("m"), ports.iter());
        let error = inputs.all_fed().expect_err("x is not fed").to_string();
        assert!(error.contains("`x` (Float32 [1])"), "{error}");
        let other =
            inputs.take("state.input", "y", &[Element::Float32]).expect_err("no such input");
        assert!(other.to_string().contains("`x`"), "{other}");
        let other = inputs.take("state.input", "x", &[Element::Uint8]).expect_err("it is a float");
        assert!(other.to_string().contains("Uint8 is expected"), "{other}");
        assert!(inputs.take("state.input", "x", &[Element::Float32]).is_ok());
        assert!(inputs.all_fed().is_ok());
        assert!(inputs.take("noise.input", "x", &[Element::Float32]).is_err(), "fed already");
    }
}
