//! A contact sheet: what the cameras saw, a row of pictures per camera, in time order.

use std::io::BufWriter;
use std::path::Path;

use sinew_runtime::CameraFrame;

/// Pictures in a row.
const COLUMNS: usize = 12;
/// Pixels between pictures.
const GAP: usize = 4;
const BACKGROUND: u8 = 24;

/// Collects frames while a run goes on.
#[derive(Debug, Default)]
pub struct Film {
    moments: Vec<Vec<CameraFrame>>,
}

impl Film {
    /// Adds one moment: a frame of every camera. Past a few thousand moments every second one is dropped.
    pub fn add(&mut self, frames: Vec<CameraFrame>) {
        if self.moments.len() >= 4096 {
            let mut keep = false;
            self.moments.retain(|_| {
                keep = !keep;
                keep
            });
        }
        if !frames.is_empty() {
            self.moments.push(frames);
        }
    }

    /// Writes the sheet: at most `rows` rows of moments spread over the whole run.
    ///
    /// # Errors
    /// What the file system or the encoder says; nothing to write is an error too.
    pub fn save(&self, file: &Path, rows: usize) -> Result<(), String> {
        let cameras = self.moments.first().map_or(0, Vec::len);
        if cameras == 0 {
            return Err("no camera sent a frame".to_owned());
        }
        let wanted = (rows * COLUMNS).min(self.moments.len());
        let chosen: Vec<&Vec<CameraFrame>> =
            (0..wanted).map(|k| &self.moments[k * self.moments.len() / wanted]).collect();
        let image = |k: usize| &self.moments[0][k].image;
        let cell_width = (0..cameras).map(|k| image(k).width()).max().unwrap_or(0) + GAP;
        let cell_height = (0..cameras).map(|k| image(k).height() + GAP).sum::<usize>() + GAP;
        let columns = COLUMNS.min(wanted);
        let (width, height) = (columns * cell_width + GAP, wanted.div_ceil(columns) * cell_height);
        let mut sheet = vec![BACKGROUND; width * height * 3];
        for (k, moment) in chosen.iter().enumerate() {
            let x = GAP + k % columns * cell_width;
            let mut y = GAP + k / columns * cell_height;
            for frame in moment.iter().take(cameras) {
                let (w, h) = (frame.image.width(), frame.image.height());
                for (row, pixels) in frame.image.data().chunks_exact(w * 3).enumerate() {
                    let at = ((y + row) * width + x) * 3;
                    if let Some(target) = sheet.get_mut(at..at + pixels.len()) {
                        target.copy_from_slice(pixels);
                    }
                }
                y += h + GAP;
            }
        }
        let fail = |e: &dyn std::fmt::Display| format!("{}: {e}", file.display());
        let out = BufWriter::new(std::fs::File::create(file).map_err(|e| fail(&e))?);
        let mut encoder = png::Encoder::new(out, width as u32, height as u32);
        encoder.set_color(png::ColorType::Rgb);
        let mut writer = encoder.write_header().map_err(|e| fail(&e))?;
        writer.write_image_data(&sheet).map_err(|e| fail(&e))
    }
}
