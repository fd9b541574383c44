//! A camera without hardware: a moving test pattern with a frame counter, to try a bus and its failures with.
//!
//! Vertical colour bars that move by one pixel a frame; the counter's 32 bits stand as black and white
//! blocks in the topmost rows, the highest bit at the left.

use std::time::Duration;

use sinew_runtime::{Camera, CameraFrame, Clock, DeviceError, Image};

/// White, yellow, cyan, green, magenta, red, blue, black: the bars of a television test card.
const BARS: [[u8; 3]; 8] = [
    [235, 235, 235],
    [235, 235, 16],
    [16, 235, 235],
    [16, 235, 16],
    [235, 16, 235],
    [235, 16, 16],
    [16, 16, 235],
    [16, 16, 16],
];
/// Bits of the counter in the picture.
const BITS: usize = 32;

/// The test pattern as a camera.
#[derive(Debug, Clone)]
pub struct PatternCamera {
    width: usize,
    height: usize,
    period: Duration,
    frame: u32,
}

impl PatternCamera {
    /// A pattern of `width` × `height` pixels, one every `period`.
    pub fn new(width: usize, height: usize, period: Duration) -> Self {
        Self { width, height, period, frame: 0 }
    }

    fn draw(&self) -> Vec<u8> {
        let counter_rows = (self.height / 8).max(1);
        let mut data = Vec::with_capacity(self.width * self.height * 3);
        for row in 0..self.height {
            for column in 0..self.width {
                let pixel = if row < counter_rows {
                    let bit = BITS - 1 - column * BITS / self.width;
                    if self.frame >> bit & 1 == 1 { [255; 3] } else { [0; 3] }
                } else {
                    let moved = (column + self.frame as usize) % self.width;
                    BARS[moved * BARS.len() / self.width]
                };
                data.extend(pixel);
            }
        }
        data
    }
}

impl Camera for PatternCamera {
    fn frame_period(&self) -> Duration {
        self.period
    }

    fn capture(&mut self) -> Result<CameraFrame, DeviceError> {
        let stamp = Clock::now();
        self.frame = self.frame.wrapping_add(1);
        let image = Image::new(self.width, self.height, self.draw().into()).map_err(|error| {
            DeviceError { device: "pattern".to_owned(), reason: error.to_string() }
        })?;
        Ok(CameraFrame { stamp, sequence: 0, image })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_frame_differs_and_carries_its_number() {
        let mut camera = PatternCamera::new(64, 48, Duration::from_millis(50));
        let frames: Vec<_> = (0..5)
            .map(|_| camera.capture().expect("a pattern always comes").image.data().to_vec())
            .collect();
        for (k, data) in frames.iter().enumerate() {
            // Two columns a bit, three bytes a pixel.
            let number = (0..BITS).fold(0, |n, bit| n << 1 | u32::from(data[bit * 6] == 255));
            assert_eq!(number as usize, k + 1);
        }
        let below = |data: &[u8]| data[64 * 3 * 6..].to_vec();
        assert_ne!(below(&frames[0]), below(&frames[1]), "the bars move");
    }
}
