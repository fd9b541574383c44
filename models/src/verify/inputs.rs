//! Made-up but plausible observations.

use sinew_runtime::{CameraFrame, Image, Observation, ObservedImage, Stamp};

use crate::ModelError;
use crate::checkpoint::Checkpoint;
use crate::processors::{Boundary, NormMode};
use crate::random::SplitMix64;

const INSTRUCTIONS: [&str; 4] = [
    "Pick up the red cube and place it in the bin.",
    "Open the top drawer",
    "push the button",
    "Move the blue block to the left, then stack it on the green one.",
];

/// `cases` made-up observations, each with the seed of its noise: the same for every comparison with `seed`.
pub(super) fn draw(
    checkpoint: &Checkpoint,
    boundary: &Boundary,
    cases: usize,
    seed: u64,
) -> impl Iterator<Item = Result<(Observation, u64), ModelError>> {
    let mut random = SplitMix64::new(seed);
    (0..cases).map(move |case| {
        let observation = observation(checkpoint, boundary, case, &mut random)?;
        Ok((observation, random.next_u64()))
    })
}

/// A made-up observation: soft gradients with grain, a state within its statistics.
fn observation(
    checkpoint: &Checkpoint,
    boundary: &Boundary,
    case: usize,
    random: &mut SplitMix64,
) -> Result<Observation, ModelError> {
    let stamp = Stamp(0);
    let shapes = checkpoint.features.cameras();
    let mut images = Vec::new();
    for (camera, (_, shape)) in boundary.cameras().into_iter().zip(shapes) {
        let (height, width) = match shape {
            [_, h, w] if (1..=4096).contains(h) && (1..=4096).contains(w) => (*h, *w),
            _ => (256, 256),
        };
        let image = image(width, height, random)
            .map_err(|e| ModelError::Compute(candle_core::Error::Msg(e.to_string())))?;
        let frame = CameraFrame { stamp, sequence: 1, image };
        images.push(ObservedImage { camera, frame, age: Default::default() });
    }
    let (state, _) = boundary.normalizers();
    let (low, high) = state.statistics();
    let proprioception = (0..boundary.state_dim())
        .map(|d| match state.mode() {
            NormMode::Identity => f64::from(random.bell()),
            NormMode::MeanStd => f64::from(low[d] + high[d] * random.bell()),
            _ => f64::from(low[d]) + f64::from(high[d] - low[d]) * random.open_unit(),
        })
        .zip(0..)
        .map(|(value, d)| {
            let degrees = checkpoint.actions.action_units.get(d).is_some_and(|u| u == "deg");
            if degrees { value.to_radians() } else { value }
        })
        .collect();
    Ok(Observation {
        instant: stamp,
        images,
        proprioception,
        proprioception_age: Default::default(),
        instruction: INSTRUCTIONS[case % INSTRUCTIONS.len()].to_owned(),
    })
}

fn image(
    width: usize,
    height: usize,
    random: &mut SplitMix64,
) -> Result<Image, sinew_runtime::ImageShapeError> {
    let waves: Vec<[f64; 4]> = (0..3).map(|_| [(); 4].map(|()| random.open_unit())).collect();
    let mut data = Vec::with_capacity(width * height * 3);
    for y in 0..height {
        for x in 0..width {
            let grain = f64::from(random.bell()) * 6.0;
            for [across, down, phase, level] in &waves {
                let (u, v) = (x as f64 / width as f64, y as f64 / height as f64);
                let wave = (6.0 * (across * u + down * v) + 6.3 * phase).sin();
                data.push((127.0 + 80.0 * wave + 40.0 * (level - 0.5) + grain) as u8);
            }
        }
    }
    Image::new(width, height, data.into())
}
