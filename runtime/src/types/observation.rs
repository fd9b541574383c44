//! What the policy sees: images, proprioception and instruction of one instant.

use std::sync::Arc;
use std::time::Duration;

use crate::Stamp;

/// An image: RGB, 8 bits a channel, rows from the top, `height × width × 3` bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    width: usize,
    height: usize,
    data: Arc<[u8]>,
}

/// An image's bytes do not fit its size.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("an RGB image of {width} x {height} needs {expected} bytes, found {found}")]
pub struct ImageShapeError {
    width: usize,
    height: usize,
    expected: usize,
    found: usize,
}

impl Image {
    /// An image of `width × height` pixels.
    ///
    /// # Errors
    /// [`ImageShapeError`] when `data` does not hold `width · height · 3` bytes.
    pub fn new(width: usize, height: usize, data: Arc<[u8]>) -> Result<Self, ImageShapeError> {
        let expected = width.saturating_mul(height).saturating_mul(3);
        if data.len() == expected {
            Ok(Self { width, height, data })
        } else {
            Err(ImageShapeError { width, height, expected, found: data.len() })
        }
    }

    /// Width (pixels).
    pub fn width(&self) -> usize {
        self.width
    }

    /// Height (pixels).
    pub fn height(&self) -> usize {
        self.height
    }

    /// Bytes, `[height, width, 3]`.
    pub fn data(&self) -> &[u8] {
        &self.data
    }
}

/// One frame of one camera.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CameraFrame {
    /// When it was exposed (clock of the camera's host).
    pub stamp: Stamp,
    /// Counts the camera's messages, from 1.
    pub sequence: u64,
    /// The picture.
    pub image: Image,
}

/// One camera's part of an observation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObservedImage {
    /// The robot's name of the camera.
    pub camera: String,
    /// Its newest frame.
    pub frame: CameraFrame,
    /// Age of the frame at the observation's instant.
    pub age: Duration,
}

/// Images, proprioception and instruction of one instant.
#[derive(Debug, Clone, PartialEq)]
pub struct Observation {
    /// The instant that it describes: the stamp of the joint state in it.
    pub instant: Stamp,
    /// The cameras' frames, in the order of the launch file.
    pub images: Vec<ObservedImage>,
    /// The robot's own state: joint positions (rad), in the arm's joint order.
    pub proprioception: Vec<f64>,
    /// Age of the joint state when the observation was assembled.
    pub proprioception_age: Duration,
    /// The language input.
    pub instruction: String,
}
