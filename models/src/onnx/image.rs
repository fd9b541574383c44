//! Camera frames as an ONNX input wants them.

use std::path::Path;

use sinew_runtime::{Image, PolicyError};

use super::binding::{Inputs, fit};
use super::graph::{Array, Data, Element};
use super::manifest::{Colors, Fit, ImageInput, Layout, Range, normalizer};
use crate::ModelError;
use crate::processors::{NormMode, Normalizer, resize};

/// One camera's input, checked against the graph.
pub(super) struct ImagePort {
    /// The policy's name of the camera.
    pub camera: String,
    /// Input of the graph.
    pub input: String,
    shape: Vec<usize>,
    /// Width and height.
    size: (usize, usize),
    bytes: bool,
    layout: Layout,
    colors: Colors,
    range: Range,
    fit: Fit,
    normalizer: Normalizer,
}

impl ImagePort {
    /// Binds the input of `camera`.
    ///
    /// # Errors
    /// [`ModelError::Config`] for what the graph contradicts.
    pub fn new(
        path: &Path,
        camera: &str,
        image: &ImageInput,
        inputs: &mut Inputs<'_>,
    ) -> Result<Self, ModelError> {
        let key = format!("images.{camera}");
        let input_key = format!("{key}.input");
        let port = inputs.take(&input_key, &image.input, &[Element::Float32, Element::Uint8])?;
        let [width, height] = image.size.map_or([None, None], |size| size.map(Some));
        let wanted = match image.layout {
            Layout::Nchw => [Some(3), height, width],
            Layout::Nhwc => [height, width, Some(3)],
        };
        let shape = fit(path, &input_key, port, &wanted)?;
        let last = &shape[shape.len() - 3..];
        let size = match image.layout {
            Layout::Nchw => (last[2], last[1]),
            Layout::Nhwc => (last[1], last[0]),
        };
        let normalizer = normalizer(path, &key, 3, image.normalization.as_ref())?;
        let bytes = port.element == Element::Uint8;
        if bytes && (image.range != Range::Byte || normalizer.mode() != NormMode::Identity) {
            let reason = format!(
                "takes bytes ({port}): range must be \"0..255\", and there is no normalization"
            );
            return Err(ModelError::config(path, &key, reason));
        }
        Ok(Self {
            camera: camera.to_owned(),
            input: image.input.clone(),
            shape,
            size,
            bytes,
            layout: image.layout,
            colors: image.colors,
            range: image.range,
            fit: image.fit,
            normalizer,
        })
    }

    /// `image` as the graph's input.
    ///
    /// # Errors
    /// [`PolicyError::Compute`] for a size that does not fit, or none at all.
    pub fn array(&self, image: &Image) -> Result<Array, PolicyError> {
        let from = (image.width(), image.height());
        let fail = |what: String| PolicyError::Compute(format!("camera `{}` {what}", self.camera));
        if from.0 * from.1 == 0 {
            return Err(fail("gave an image without pixels".to_owned()));
        }
        if self.fit == Fit::Exact && from != self.size {
            return Err(fail(format!(
                "gave {} x {} pixels, the model takes {} x {}; set the camera's size, or fit = \"stretch\" in the \
                 manifest",
                from.0, from.1, self.size.0, self.size.1
            )));
        }
        let planes = resize::to_planes(image.data(), from);
        let planes = match self.fit {
            Fit::PadLeftTop => resize::resize_with_pad(planes, self.size),
            Fit::Stretch | Fit::Exact => resize::stretch(planes, self.size),
        };
        let area = self.size.0 * self.size.1;
        let mut values = vec![0.0; 3 * area];
        for channel in 0..3 {
            let color = if self.colors == Colors::Bgr { 2 - channel } else { channel };
            for (pixel, value) in planes.values.row(color).iter().enumerate() {
                let value = match self.range {
                    Range::Unit => *value,
                    Range::Signed => *value * 2.0 - 1.0,
                    Range::Byte => *value * 255.0,
                };
                let at = match self.layout {
                    Layout::Nchw => channel * area + pixel,
                    Layout::Nhwc => pixel * 3 + channel,
                };
                values[at] = self.normalizer.normalize(channel, value);
            }
        }
        let data = if self.bytes {
            // Resized bytes lie between 0 and 255.
            Data::Byte(values.iter().map(|v| v.round() as u8).collect())
        } else {
            Data::Float(values)
        };
        Ok(Array { shape: self.shape.clone(), data })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::onnx::graph::Port;

    fn port(text: &str, element: Element, shape: &[usize]) -> Result<ImagePort, ModelError> {
        let shape = Some(shape.iter().map(|n| Some(*n)).collect());
        let ports = [Port { name: "pixels".into(), element, shape }];
        let image = toml::from_str(&format!("input = 'pixels'\n{text}")).expect("it has the form");
        let path = Path::new("manifest.toml");
        ImagePort::new(path, "front", &image, &mut Inputs::new(path, ports.iter()))
    }

    /// Red at the left, blue at the right.
    fn two_pixels() -> Image {
        Image::new(2, 1, vec![255, 0, 51, 0, 0, 255].into()).expect("six bytes")
    }

    #[test]
    fn layout_colours_and_range_are_the_manifests() {
        for (text, shape, expected) in [
            (
                "layout='nchw'\ncolors='rgb'\nrange='0..1'",
                [1, 3, 1, 2],
                [1.0, 0.0, 0.0, 0.0, 0.2, 1.0],
            ),
            (
                "layout='nhwc'\ncolors='rgb'\nrange='0..1'",
                [1, 1, 2, 3],
                [1.0, 0.0, 0.2, 0.0, 0.0, 1.0],
            ),
            (
                "layout='nhwc'\ncolors='bgr'\nrange='-1..1'",
                [1, 1, 2, 3],
                [-0.6, -1.0, 1.0, 1.0, -1.0, -1.0],
            ),
            (
                "layout='nchw'\ncolors='bgr'\nrange='0..255'",
                [1, 3, 1, 2],
                [51.0, 255.0, 0.0, 0.0, 255.0, 0.0],
            ),
        ] {
            let port = port(&format!("{text}\nfit='exact'"), Element::Float32, &shape).expect(text);
            let array = port.array(&two_pixels()).expect(text);
            assert_eq!(array.shape, shape);
            let values = array.as_floats().expect("floats");
            assert!(
                values.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-6),
                "{text} {values:?}"
            );
        }
    }

    #[test]
    fn bytes_stay_bytes_and_the_mean_is_by_colour() {
        let text = "layout='nhwc'\ncolors='rgb'\nrange='0..255'\nfit='exact'";
        let array =
            port(text, Element::Uint8, &[1, 2, 3]).map(|p| p.array(&two_pixels()).expect(text));
        assert_eq!(array.expect("it binds").data, Data::Byte(vec![255, 0, 51, 0, 0, 255]));
        let text = "layout='nchw'\ncolors='rgb'\nrange='0..1'\nfit='exact'\n\
                    normalization={mode='mean_std',mean=[0.5,0.25,0.0],std=[0.5,1.0,2.0]}";
        let array =
            port(text, Element::Float32, &[3, 1, 2]).map(|p| p.array(&two_pixels()).expect(text));
        let expected = [1.0, -1.0, -0.25, -0.25, 0.1, 0.5];
        let values = array.expect("it binds").as_floats().expect("floats").to_vec();
        assert!(values.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-6), "{values:?}");
    }

    #[test]
    fn contradictions_and_other_sizes_are_errors() {
        let text = "layout='nchw'\ncolors='rgb'\nrange='0..1'\nfit='exact'";
        let error = port(text, Element::Uint8, &[1, 3, 1, 2]).err().expect("bytes have no 0..1");
        assert!(error.to_string().contains("0..255"), "{error}");
        let error = port(text, Element::Float32, &[1, 1, 2, 3]).err().expect("that is nhwc");
        assert!(error.to_string().contains("images.front.input"), "{error}");
        let small = port(text, Element::Float32, &[1, 3, 4, 4]).expect("it binds");
        let error = small.array(&two_pixels()).expect_err("another size");
        assert!(error.to_string().contains("4 x 4"), "{error}");
    }
}
