//! Runs the scripted expert and reports: `sim_expert [seeds] [touch] [sheet FILE]`.
//!
//! Prints the success rate, the simulated time a task takes and the speed of world and renderer;
//! with `sheet`, writes a picture of both cameras over one episode as a PPM file.

use std::time::Instant;

use sinew_drivers::sim::{ArmDescription, CameraKind, Episode, Renderer, Scene, Task};

/// Longest episode (actions).
const MOST_ACTIONS: usize = 150;

fn episode(arm: &ArmDescription, seed: u64, touch: bool) -> Episode {
    let scene = Scene::from_seed(arm, seed);
    let task = if touch { Task::Touch { colour: scene.task.colour() } } else { scene.task };
    Episode::new(arm, scene, task, task.instruction(0))
}

fn sheet(arm: &ArmDescription, path: &str, touch: bool) -> std::io::Result<()> {
    const SIZE: usize = 192;
    const COLUMNS: usize = 8;
    let rows = 4;
    let (width, height) = (SIZE * COLUMNS, SIZE * 2 * rows);
    let mut picture = vec![0u8; width * height * 3];
    let mut renderer = Renderer::new(SIZE, SIZE);
    let mut image = vec![0u8; renderer.image_bytes()];
    let mut episode = episode(arm, 3, touch);
    for cell in 0..COLUMNS * rows {
        for kind in CameraKind::ALL {
            let world = episode.world();
            renderer.render(world.arm(), world.scene(), episode.snapshot(), kind, &mut image);
            let top = (cell / COLUMNS * 2 + kind.index()) * SIZE;
            for (y, line) in image.chunks_exact(SIZE * 3).enumerate() {
                let at = ((top + y) * width + cell % COLUMNS * SIZE) * 3;
                picture[at..at + SIZE * 3].copy_from_slice(line);
            }
        }
        for _ in 0..2 {
            let advice = *episode.advice();
            episode.act(&advice);
        }
    }
    let mut file = format!("P6 {width} {height} 255\n").into_bytes();
    file.extend(picture);
    std::fs::write(path, file)
}

fn main() -> std::io::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let seeds = arguments.first().and_then(|s| s.parse().ok()).unwrap_or(200u64);
    let touch = arguments.iter().any(|a| a == "touch");
    let arm = ArmDescription::desk_arm();
    if let Some(at) = arguments.iter().position(|a| a == "sheet") {
        return sheet(&arm, arguments.get(at + 1).map_or("sheet.ppm", String::as_str), touch);
    }
    let (mut successes, mut wrong, mut simulated) = (0u32, 0u32, 0.0);
    let mut retries = 0u32;
    let mut times: Vec<f64> = Vec::new();
    let start = Instant::now();
    for seed in 0..seeds {
        let mut episode = episode(&arm, seed, touch);
        let mut phases = String::new();
        for _ in 0..MOST_ACTIONS {
            let advice = *episode.advice();
            episode.act(&advice);
            phases.push(char::from(b'0' + episode.phase() as u8));
            if episode.truth().done() {
                break;
            }
        }
        let truth = episode.truth();
        simulated += truth.time;
        wrong += u32::from(truth.wrong_object || truth.wrong_bin);
        if truth.success {
            successes += 1;
            times.push(truth.time);
            // Back to the approach after anything else: it lost or missed the cube.
            if ["10", "20", "30", "40", "50"].iter().any(|turn| phases.contains(turn)) {
                retries += 1;
                println!("seed {seed} tried again: {phases}");
            }
        } else {
            println!("seed {seed} failed: {truth:?}\n  phases {phases}");
        }
    }
    let wall = start.elapsed().as_secs_f64();
    times.sort_by(f64::total_cmp);
    println!("success {successes} of {seeds}, wrong {wrong}, with a second try {retries}");
    if let (Some(middle), Some(longest)) = (times.get(times.len() / 2), times.last()) {
        println!("time to success: median {middle:.1} s, longest {longest:.1} s");
    }
    println!("world with judge and expert: {:.0} x real time", simulated / wall);
    let episode = episode(&arm, 1, touch);
    let mut renderer = Renderer::new(96, 96);
    let mut image = vec![0u8; renderer.image_bytes()];
    for kind in CameraKind::ALL {
        let start = Instant::now();
        for _ in 0..300 {
            let world = episode.world();
            renderer.render(world.arm(), world.scene(), episode.snapshot(), kind, &mut image);
        }
        let milliseconds = start.elapsed().as_secs_f64() / 300.0 * 1e3;
        println!("render {}: {milliseconds:.3} ms a frame at 96 x 96", kind.name());
    }
    Ok(())
}
