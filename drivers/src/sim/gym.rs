//! Many simulators behind one pipe, for training.
//!
//! Binary, little-endian. At the start the server writes one line of JSON that describes what follows.
//!
//! | request | then | reply |
//! | --- | --- | --- |
//! | `R` | u32 env, u64 seed, u8 kind (0 pick-place, 1 touch, 255 the seed's own), i32 colour (-1: drawn), i32 bin (-1: drawn), u32 phrase (`u32::MAX`: drawn) | none |
//! | `I` | u32 env | u32 length, instruction |
//! | `S` | for every env: u8 active, 6 x f32 joint targets (rad) | none |
//! | `O` | | for every env: u8 `[2, H, W, 3]`, 6 x f32 joints, 6 x f32 advice, the info floats |
//! | `L` | | for every env: u8 `[2, H, W]` classes |

use std::io::{self, BufReader, BufWriter, Read, Write};

use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64;

use super::description::{ArmDescription, JOINT_NAMES, JOINTS};
use super::episode::Episode;
use super::kinematics::Joints;
use super::raster::Pinhole;
use super::render::{CLASS_BIN, CameraKind, Renderer, cube_class};
use super::scene::{BIN_HALF, CUBE_HALF, Scene};
use super::task::{BinSide, Colour, Task};

/// Threads that step and render.
const WORKERS: usize = 2;
/// Fewer pixels than this of a thing do not make it visible.
const VISIBLE_PIXELS: usize = 4;

/// What the server simulates.
#[derive(Debug, Clone)]
pub struct GymConfig {
    /// Number of simulators.
    pub envs: usize,
    /// Width and height of the images (pixels).
    pub size: usize,
    /// The arm.
    pub arm: ArmDescription,
}

/// Names of the info floats, in order.
pub fn info_names() -> Vec<String> {
    let mut names: Vec<String> = "success wrong_object wrong_bin done phase target_x target_y \
        target_z bin_x bin_y tip_x tip_y tip_z held time"
        .split_whitespace()
        .map(str::to_owned)
        .collect();
    let mut things = vec!["target".to_owned(), "bin".to_owned()];
    things.extend(Colour::ALL.map(|c| c.name().to_owned()));
    for camera in CameraKind::ALL {
        for thing in &things {
            for field in ["u", "v", "half", "visible"] {
                names.push(format!("{}_{thing}_{field}", camera.name()));
            }
        }
    }
    names
}

struct Env {
    episode: Episode,
}

fn reset(arm: &ArmDescription, seed: u64, kind: u8, colour: i32, bin: i32, phrase: u32) -> Env {
    let scene = Scene::from_seed(arm, seed);
    // Its own stream of numbers, so that the scene stays that of the seed.
    let mut random = Pcg64::seed_from_u64(seed ^ 0x5eed_7a5c);
    let present = scene.colours();
    let pick = |list: &[Colour], index: i32| {
        usize::try_from(index).ok().and_then(|i| list.get(i).copied())
    };
    let colour = pick(&Colour::ALL, colour).filter(|c| present.contains(c));
    let bin = usize::try_from(bin).ok().and_then(|i| BinSide::ALL.get(i).copied());
    let task = match kind {
        255 => scene.task,
        kind => Task::draw(&mut random, &present, kind == 1, colour, bin),
    };
    let drawn = random.random_range(0..8usize);
    let phrase = if phrase == u32::MAX { drawn } else { phrase as usize };
    Env { episode: Episode::new(arm, scene, task, task.instruction(phrase)) }
}

fn place(
    out: &mut Vec<f32>,
    camera: &Pinhole,
    size: usize,
    thing: Option<(nalgebra::Point3<f64>, f64, usize)>,
) {
    let Some((at, half, pixels)) = thing else {
        out.extend([0.0; 4]);
        return;
    };
    let limit = size as f64;
    match camera.project(&at) {
        Some([u, v, depth]) => {
            let inside = (0.0..limit).contains(&u) && (0.0..limit).contains(&v);
            let visible = inside && pixels >= VISIBLE_PIXELS;
            let clamp = |x: f64| x.clamp(-limit, 2.0 * limit) as f32;
            out.extend([
                clamp(u),
                clamp(v),
                (camera.focal * half / depth) as f32,
                f32::from(u8::from(visible)),
            ]);
        }
        None => out.extend([0.0; 4]),
    }
}

/// Buffers of one worker.
struct Painter {
    renderer: Renderer,
    labels: Vec<u8>,
    size: usize,
}

impl Painter {
    fn new(size: usize) -> Self {
        Self { renderer: Renderer::new(size, size), labels: vec![0; size * size], size }
    }

    fn image(&mut self, env: &Env, kind: CameraKind, out: &mut [u8]) {
        let world = env.episode.world();
        self.renderer.render(world.arm(), world.scene(), env.episode.snapshot(), kind, out);
        self.renderer.labels(&mut self.labels);
    }

    fn observe(&mut self, env: &Env, out: &mut Vec<u8>) {
        let (episode, world) = (&env.episode, env.episode.world());
        let (snapshot, truth, task) = (episode.snapshot(), episode.truth(), episode.task());
        let target = snapshot.cube(task.colour());
        let centre = target.map(|c| c.centre().coords).unwrap_or_default();
        let bin = task.bin().map(|b| world.scene().bins[b.index()].translation.vector);
        let bin_at = bin.unwrap_or_default();
        let held = truth.held.map_or(0.0, |c| if c == task.colour() { 1.0 } else { 2.0 });
        let flag = |b: bool| f32::from(u8::from(b));
        let tip = truth.fingertips;
        let mut info = vec![
            flag(truth.success),
            flag(truth.wrong_object),
            flag(truth.wrong_bin),
            flag(truth.done()),
            episode.phase() as u8 as f32,
        ];
        info.extend([centre.x, centre.y, centre.z, bin_at.x, bin_at.y].map(|v| v as f32));
        info.extend(tip.map(|v| v as f32));
        info.extend([held, snapshot.time as f32]);
        for kind in CameraKind::ALL {
            let start = out.len();
            out.resize(start + self.renderer.image_bytes(), 0);
            self.image(env, kind, &mut out[start..]);
            let mut pixels = [0usize; 256];
            for class in &self.labels {
                pixels[usize::from(*class)] += 1;
            }
            let camera = self.renderer.camera(kind, world.scene(), snapshot);
            let cube = |colour: Colour| {
                let count = pixels[usize::from(cube_class(colour))];
                snapshot.cube(colour).map(|c| (c.centre(), CUBE_HALF, count))
            };
            place(&mut info, &camera, self.size, cube(task.colour()));
            let bin = task.bin().zip(bin).map(|(side, at)| {
                (at.into(), BIN_HALF, pixels[usize::from(CLASS_BIN) + side.index()])
            });
            place(&mut info, &camera, self.size, bin);
            for colour in Colour::ALL {
                place(&mut info, &camera, self.size, cube(colour));
            }
        }
        for value in snapshot.joints.iter().chain(episode.advice()) {
            out.extend((*value as f32).to_le_bytes());
        }
        for value in info {
            out.extend(value.to_le_bytes());
        }
    }

    fn classes(&mut self, env: &Env, out: &mut Vec<u8>) {
        let mut image = vec![0; self.renderer.image_bytes()];
        for kind in CameraKind::ALL {
            self.image(env, kind, &mut image);
            out.extend_from_slice(&self.labels);
        }
    }
}

fn read<const N: usize>(input: &mut impl Read) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    input.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn env_index(input: &mut impl Read, envs: usize) -> io::Result<usize> {
    let index = u32::from_le_bytes(read(input)?) as usize;
    if index < envs {
        Ok(index)
    } else {
        let text = format!("there is no simulator {index}; they are 0 to {}", envs - 1);
        Err(io::Error::new(io::ErrorKind::InvalidInput, text))
    }
}

fn header(config: &GymConfig) -> String {
    let quoted =
        |names: &[String]| names.iter().map(|n| format!("\"{n}\"")).collect::<Vec<_>>().join(",");
    let joints: Vec<String> = JOINT_NAMES.map(str::to_owned).to_vec();
    let numbers = |pick: fn(&sinew_runtime::JointLimits) -> f64| {
        let limits = config.arm.limits();
        limits.iter().map(|l| format!("{:.6}", pick(l))).collect::<Vec<_>>().join(",")
    };
    format!(
        "{{\"envs\":{},\"cameras\":[\"front\",\"wrist\"],\"height\":{size},\"width\":{size},\
         \"joints\":[{}],\"action_rate_hz\":10,\"lower\":[{}],\"upper\":[{}],\"info\":[{}]}}\n",
        config.envs,
        quoted(&joints),
        numbers(|l| l.lower),
        numbers(|l| l.upper),
        quoted(&info_names()),
        size = config.size,
    )
}

/// Runs `work` on every simulator, on all workers; the replies come in the simulators' order.
fn on_all(
    envs: &mut [Env],
    painters: &mut [Painter],
    work: impl Fn(usize, &mut Env, &mut Painter, &mut Vec<u8>) + Sync,
) -> Vec<Vec<u8>> {
    let share = envs.len().div_ceil(painters.len()).max(1);
    let work = &work;
    std::thread::scope(|scope| {
        let parts = envs.chunks_mut(share).zip(painters.iter_mut()).enumerate();
        let threads: Vec<_> = parts
            .map(|(part, (envs, painter))| {
                scope.spawn(move || {
                    let mut out = Vec::new();
                    for (i, env) in envs.iter_mut().enumerate() {
                        work(part * share + i, env, painter, &mut out);
                    }
                    out
                })
            })
            .collect();
        let replies = threads.into_iter().map(|thread| thread.join());
        replies
            .map(|reply| reply.unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect()
    })
}

/// Serves until `input` ends.
///
/// # Errors
/// Of reading and writing, an unknown request, or an index out of range.
pub fn serve(input: impl Read, output: impl Write, config: &GymConfig) -> io::Result<()> {
    let mut input = BufReader::new(input);
    let mut output = BufWriter::new(output);
    let arm = &config.arm;
    let own = |seed| reset(arm, seed, 255, -1, -1, u32::MAX);
    let mut envs: Vec<Env> = (0..config.envs as u64).map(own).collect();
    let mut painters: Vec<Painter> = (0..WORKERS).map(|_| Painter::new(config.size)).collect();
    output.write_all(header(config).as_bytes())?;
    output.flush()?;
    loop {
        let mut request = [0; 1];
        if input.read(&mut request)? == 0 {
            return Ok(());
        }
        match request[0] {
            b'R' => {
                let env = env_index(&mut input, envs.len())?;
                let seed = u64::from_le_bytes(read(&mut input)?);
                let [kind] = read(&mut input)?;
                let colour = i32::from_le_bytes(read(&mut input)?);
                let bin = i32::from_le_bytes(read(&mut input)?);
                let phrase = u32::from_le_bytes(read(&mut input)?);
                envs[env] = reset(arm, seed, kind, colour, bin, phrase);
            }
            b'I' => {
                let env = env_index(&mut input, envs.len())?;
                let text = &envs[env].episode.truth().instruction;
                output.write_all(&(text.len() as u32).to_le_bytes())?;
                output.write_all(text.as_bytes())?;
                output.flush()?;
            }
            b'S' => {
                let mut actions: Vec<Option<Joints>> = Vec::with_capacity(envs.len());
                for _ in 0..envs.len() {
                    let [active] = read(&mut input)?;
                    let mut target = [0.0; JOINTS];
                    for value in &mut target {
                        *value = f64::from(f32::from_le_bytes(read(&mut input)?));
                    }
                    actions.push((active != 0).then_some(target));
                }
                on_all(&mut envs, &mut painters, |i, env, _, _| {
                    if let Some(target) = &actions[i] {
                        env.episode.act(target);
                    }
                });
            }
            b'O' | b'L' => {
                let classes = request[0] == b'L';
                let replies = on_all(&mut envs, &mut painters, |_, env, painter, out| {
                    if classes { painter.classes(env, out) } else { painter.observe(env, out) }
                });
                for reply in replies {
                    output.write_all(&reply)?;
                }
                output.flush()?;
            }
            other => {
                let text = format!("unknown request byte {other:#04x}; known are R, I, S, O, L");
                return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
            }
        }
    }
}
