//! The simulator's referee on the bus: sets up scenes on request and publishes what is true. The policy
//! sees neither key.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use sinew_drivers::sim::world::PHYSICS_STEP;
use sinew_drivers::sim::{ArmDescription, BinSide, GroundTruth, Scene, SimHandle, Task};
use sinew_runtime::Clock;
use sinew_runtime::transport::{Bus, Keys, Priority, Subscription};

use super::episode::{Outcome, SceneReply, SceneRequest};
use super::robot::{Referee, RunError};

/// Time between two ground truths.
const PERIOD: Duration = Duration::from_millis(50);

/// The simulator's side: answers scene requests, publishes ground truth.
pub(super) struct RefereePeer {
    sim: Arc<SimHandle>,
    quit: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    _scenes: Subscription,
}

impl RefereePeer {
    /// Puts the referee of `sim` on the bus.
    pub fn spawn(sim: SimHandle, keys: &Keys, bus: &Bus) -> Result<Self, RunError> {
        let publisher = bus.publisher(&keys.ground_truth(), Priority::Data)?;
        let sim = Arc::new(sim);
        let stage = sim.clone();
        let scenes = bus.serve(&keys.sim_reset(), move |asked| {
            let request: SceneRequest = serde_json::from_slice(asked).map_err(|e| e.to_string())?;
            let scene = choose(stage.description(), &request)?;
            stage.reset(scene.seed, Some(&scene.instruction));
            serde_json::to_vec(&scene).map_err(|e| e.to_string())
        })?;
        let quit = Arc::new(AtomicBool::new(false));
        let (seen, handle) = (quit.clone(), sim.clone());
        let thread = std::thread::Builder::new()
            .name("sim-referee".into())
            .spawn(move || {
                while !seen.load(Ordering::Relaxed) {
                    // The truth is plain numbers and names; it always has a JSON form.
                    if let Ok(text) = serde_json::to_vec(&sim.ground_truth()) {
                        publisher.put(text, Clock::now());
                    }
                    std::thread::sleep(PERIOD);
                }
            })
            .map_err(|e| RunError::System {
                what: "starting the referee's thread",
                reason: e.to_string(),
            })?;
        Ok(Self { sim: handle, quit, thread: Some(thread), _scenes: scenes })
    }

    /// Simulated time that was skipped because the host slept too long.
    pub fn skipped(&self) -> Duration {
        Duration::from_secs_f64(self.sim.skipped_steps() as f64 * PHYSICS_STEP)
    }
}

impl Drop for RefereePeer {
    fn drop(&mut self) {
        self.quit.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A panic in it has been printed.
            let _ = thread.join();
        }
    }
}

/// Scenes tried until one has the named cube.
const SCENES: u64 = 64;

/// The scene and the instruction that `request` means.
///
/// A scene has three of four colours; an instruction that names the fourth takes the next scene that has it.
fn choose(arm: &ArmDescription, request: &SceneRequest) -> Result<SceneReply, String> {
    let scene = Scene::from_seed(arm, request.seed);
    let asked = request.instruction.as_deref();
    let task = asked.map_or(Some(scene.task), Task::from_instruction);
    if let Some(task) = task.filter(|_| request.swap) {
        let instruction = swapped(&scene, task).instruction(0);
        return Ok(SceneReply { seed: scene.seed, instruction });
    }
    let Some(asked) = asked else {
        return Ok(SceneReply { seed: scene.seed, instruction: scene.task.instruction(0) });
    };
    let has = |seed: &u64| {
        task.is_none_or(|t| Scene::from_seed(arm, *seed).colours().contains(&t.colour()))
    };
    let seed = (0..SCENES).map(|k| request.seed.wrapping_add(k)).find(has).ok_or_else(|| {
        format!("none of {SCENES} scenes from seed {} on has what `{asked}` names", request.seed)
    })?;
    Ok(SceneReply { seed, instruction: asked.to_owned() })
}

/// Another cube of the scene, and the other bin.
fn swapped(scene: &Scene, task: Task) -> Task {
    let others: Vec<_> = scene.colours().into_iter().filter(|c| *c != task.colour()).collect();
    let colour = match others.len() {
        0 => task.colour(),
        n => others[(scene.seed % n as u64) as usize],
    };
    match task {
        Task::PickPlace { bin: BinSide::Left, .. } => {
            Task::PickPlace { colour, bin: BinSide::Right }
        }
        Task::PickPlace { bin: BinSide::Right, .. } => {
            Task::PickPlace { colour, bin: BinSide::Left }
        }
        Task::Touch { .. } => Task::Touch { colour },
    }
}

/// The run's side: keeps the verdict.
pub(super) fn listen(
    bus: &Bus,
    keys: &Keys,
    referee: &Arc<Mutex<Referee>>,
) -> Result<Subscription, RunError> {
    let referee = referee.clone();
    Ok(bus.subscribe(&keys.ground_truth(), move |_, payload| {
        match serde_json::from_slice::<GroundTruth>(payload) {
            Ok(truth) => {
                referee.lock().unwrap_or_else(PoisonError::into_inner).outcome = verdict(&truth);
            }
            Err(error) => tracing::warn!(%error, "a ground truth was left out"),
        }
    })?)
}

/// How the episode ended, by what is true; `None` while it goes on.
fn verdict(truth: &GroundTruth) -> Option<Outcome> {
    match truth {
        t if t.wrong_object => Some(Outcome::WrongObject),
        t if t.wrong_bin => Some(Outcome::WrongPlace),
        t if t.success => Some(Outcome::Success),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(seed: u64, instruction: Option<&str>, swap: bool) -> SceneRequest {
        SceneRequest { seed, instruction: instruction.map(str::to_owned), swap }
    }

    #[test]
    fn a_swapped_task_names_another_cube_and_the_other_bin_of_the_same_scene() {
        let arm = ArmDescription::desk_arm();
        for seed in 0..50 {
            let scene = Scene::from_seed(&arm, seed);
            let own = choose(&arm, &request(seed, None, false)).expect("every seed has a task");
            let other = choose(&arm, &request(seed, None, true)).expect("and another");
            let task = |r: &SceneReply| Task::from_instruction(&r.instruction).expect("a task");
            let (own, other) = (task(&own), task(&other));
            assert_ne!(own.colour(), other.colour());
            assert_ne!(own.bin(), other.bin());
            assert!(scene.colours().contains(&other.colour()));
        }
    }

    #[test]
    fn a_named_cube_is_in_the_scene() {
        let arm = ArmDescription::desk_arm();
        for seed in 0..20 {
            let asked = "please put the blue one into the right bin";
            let reply = choose(&arm, &request(seed, Some(asked), false)).expect("found");
            let colours = Scene::from_seed(&arm, reply.seed).colours();
            assert!(colours.iter().any(|c| c.name() == "blue"), "{seed}");
            assert_eq!(reply.instruction, asked);
        }
    }
}
