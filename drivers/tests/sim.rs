//! The simulated robot as a whole: determinism, the expert, the judge, the pictures, the gym's pipe.
#![allow(clippy::unwrap_used)]

use sinew_drivers::sim::gym::{GymConfig, info_names, serve};
use sinew_drivers::sim::kinematics::Joints;
use sinew_drivers::sim::render::cube_class;
use sinew_drivers::sim::{
    ArmDescription, BinSide, CameraKind, Colour, Episode, Expert, GroundTruth, Renderer, Scene,
    Task,
};

fn arm() -> ArmDescription {
    ArmDescription::desk_arm()
}

fn episode(seed: u64, task: Task) -> Episode {
    let arm = arm();
    Episode::new(&arm, Scene::from_seed(&arm, seed), task, task.instruction(0))
}

fn picture(renderer: &mut Renderer, episode: &Episode, kind: CameraKind) -> Vec<u8> {
    let mut image = vec![0; renderer.image_bytes()];
    let world = episode.world();
    renderer.render(world.arm(), world.scene(), episode.snapshot(), kind, &mut image);
    image
}

/// Follows the episode's own expert for at most `actions`.
fn follow(episode: &mut Episode, actions: usize) -> GroundTruth {
    for _ in 0..actions {
        if episode.truth().done() {
            break;
        }
        let advice = *episode.advice();
        episode.act(&advice);
    }
    episode.truth().clone()
}

/// Does `other` in an episode that is about another task.
fn do_other(episode: &mut Episode, other: Task, actions: usize) {
    let mut expert = Expert::default();
    for _ in 0..actions {
        let world = episode.world();
        let advice = expert.advise(world.arm(), world.scene(), episode.snapshot(), other, false);
        episode.act(&advice);
    }
}

#[test]
fn the_same_seed_and_actions_give_the_same_states_and_pictures() {
    let run = || {
        let mut episode = Episode::from_seed(&arm(), 11);
        for k in 0..25 {
            let mut action: Joints = *episode.advice();
            action[0] += 0.02 * f64::from(k % 3);
            episode.act(&action);
        }
        let mut renderer = Renderer::new(64, 64);
        let pictures = CameraKind::ALL.map(|kind| picture(&mut renderer, &episode, kind));
        (episode.snapshot().clone(), pictures)
    };
    assert_eq!(run(), run());
}

#[test]
fn the_expert_succeeds_and_does_nothing_wrong() {
    for seed in 0..20 {
        let scene = Scene::from_seed(&arm(), seed);
        for task in [scene.task, Task::Touch { colour: scene.task.colour() }] {
            let truth = follow(&mut episode(seed, task), 100);
            assert!(truth.success, "seed {seed}: {truth:?}");
            assert!(!truth.wrong_object && !truth.wrong_bin, "seed {seed}: {truth:?}");
        }
    }
}

#[test]
fn the_expert_takes_over_with_the_wrong_cube_in_the_gripper() {
    for seed in 0..12 {
        let scene = Scene::from_seed(&arm(), seed);
        let wrong = scene.colours().into_iter().find(|c| *c != scene.task.colour()).unwrap();
        let mut episode = episode(seed, scene.task);
        for bin in BinSide::ALL {
            do_other(&mut episode, Task::PickPlace { colour: wrong, bin }, 22);
        }
        let truth = follow(&mut episode, 200);
        assert!(truth.success && truth.wrong_object, "seed {seed}: {truth:?}");
    }
}

#[test]
fn the_expert_takes_over_after_blind_motion() {
    for seed in 0..12u32 {
        let mut episode = Episode::from_seed(&arm(), u64::from(seed));
        for k in 0..20u32 {
            let mut action: Joints = *episode.advice();
            for (joint, value) in (0u32..).zip(&mut action) {
                let noise = (seed * 31 + k / 5 * 17 + joint * 7) % 13;
                *value += 0.05 * (f64::from(noise) - 6.0);
            }
            episode.act(&action);
        }
        let truth = follow(&mut episode, 200);
        assert!(truth.success || truth.lost, "seed {seed}: {truth:?}");
    }
}

#[test]
fn the_judge_sees_the_wrong_cube_and_the_wrong_bin() {
    let scene = Scene::from_seed(&arm(), 4);
    let Task::PickPlace { colour, bin } = scene.task else { panic!("seeds name pick-place tasks") };
    let other_bin = BinSide::ALL.into_iter().find(|b| *b != bin).unwrap();
    let other = scene.colours().into_iter().find(|c| *c != colour).unwrap();

    let mut one = episode(4, scene.task);
    do_other(&mut one, Task::PickPlace { colour: other, bin }, 60);
    let truth = one.truth();
    assert!(truth.wrong_object && !truth.wrong_bin && !truth.success, "{truth:?}");

    let mut two = episode(4, scene.task);
    do_other(&mut two, Task::PickPlace { colour, bin: other_bin }, 60);
    let truth = two.truth();
    assert!(truth.wrong_bin && !truth.wrong_object && !truth.success, "{truth:?}");

    let mut three = episode(4, Task::Touch { colour });
    do_other(&mut three, Task::PickPlace { colour: other, bin }, 30);
    assert!(three.truth().wrong_object && !three.truth().success);

    let mut still = episode(4, scene.task);
    let start = still.world().scene().start;
    for _ in 0..30 {
        still.act(&start);
    }
    let truth = still.truth();
    assert!(!(truth.success || truth.wrong_object || truth.wrong_bin || truth.lost));
    assert_eq!(truth.held, None);
}

#[test]
fn nothing_goes_through_the_table() {
    let mut episode = Episode::from_seed(&arm(), 2);
    let down = [0.3, 1.2, 0.4, 1.2, 0.0, 0.0];
    for _ in 0..20 {
        episode.act(&down);
        assert!(episode.snapshot().frames.hand.translation.z > 0.0);
    }
}

#[test]
fn cubes_are_seen_where_the_camera_projects_them() {
    let mut renderer = Renderer::new(96, 96);
    for seed in 0..10 {
        let episode = Episode::from_seed(&arm(), seed);
        for kind in CameraKind::ALL {
            let image = picture(&mut renderer, &episode, kind);
            let mut labels = vec![0; 96 * 96];
            renderer.labels(&mut labels);
            let camera = renderer.camera(kind, episode.world().scene(), episode.snapshot());
            for cube in &episode.snapshot().cubes {
                let class = cube_class(cube.colour);
                let found: Vec<usize> = (0..96 * 96).filter(|i| labels[*i] == class).collect();
                let [u, v, _] = camera.project(&cube.centre()).unwrap();
                if found.len() < 25 || !(8.0..88.0).contains(&u) || !(8.0..88.0).contains(&v) {
                    assert!(kind == CameraKind::Wrist || !found.is_empty(), "seed {seed}");
                    continue;
                }
                let middle = |of: fn(usize) -> usize| {
                    found.iter().map(|i| of(*i) as f64 + 0.5).sum::<f64>() / found.len() as f64
                };
                let (x, y) = (middle(|i| i % 96), middle(|i| i / 96));
                assert!((x - u).abs() < 2.0 && (y - v).abs() < 2.0, "seed {seed}: {x} {u} {y} {v}");
                // The pixel there has the cube's colour: its strongest channels are the right ones.
                let at = (y as usize * 96 + x as usize) * 3;
                let [r, g, b] = [image[at], image[at + 1], image[at + 2]].map(i32::from);
                let right = match cube.colour {
                    Colour::Red => r > g + 30 && r > b + 30,
                    Colour::Green => g > r + 30 && g > b + 30,
                    Colour::Blue => b > r + 30 && b > g + 30,
                    Colour::Yellow => r > b + 30 && g > b + 30,
                };
                assert!(right, "seed {seed}: {:?} is drawn as {r} {g} {b}", cube.colour);
            }
        }
    }
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|c| f32::from_le_bytes(c.try_into().unwrap())).collect()
}

#[test]
fn the_gym_answers_its_protocol() {
    const SIZE: usize = 32;
    let config = GymConfig { envs: 3, size: SIZE, arm: arm() };
    let mut requests = Vec::new();
    requests.push(b'R');
    requests.extend(1u32.to_le_bytes());
    requests.extend(77u64.to_le_bytes());
    requests.push(1);
    requests.extend((-1i32).to_le_bytes());
    requests.extend((-1i32).to_le_bytes());
    requests.extend(0u32.to_le_bytes());
    requests.push(b'I');
    requests.extend(1u32.to_le_bytes());
    requests.push(b'S');
    for active in [0u8, 1, 0] {
        requests.push(active);
        for value in [0.0f32; 6] {
            requests.extend(value.to_le_bytes());
        }
    }
    requests.extend([b'O', b'L']);
    let mut reply = Vec::new();
    serve(requests.as_slice(), &mut reply, &config).unwrap();

    let line_end = reply.iter().position(|b| *b == b'\n').unwrap();
    let header = std::str::from_utf8(&reply[..line_end]).unwrap();
    assert!(header.starts_with("{\"envs\":3,") && header.contains("\"front_target_u\""));
    let rest = &reply[line_end + 1..];
    let length = u32::from_le_bytes(rest[..4].try_into().unwrap()) as usize;
    let instruction = std::str::from_utf8(&rest[4..4 + length]).unwrap();
    assert!(instruction.starts_with("touch the "), "{instruction}");

    let info = info_names();
    let images = 2 * SIZE * SIZE * 3;
    let one = images + 4 * (12 + info.len());
    let rest = &rest[4 + length..];
    assert_eq!(rest.len(), 3 * one + 3 * 2 * SIZE * SIZE);
    let time = info.iter().position(|name| name == "time").unwrap();
    for (env, expected) in [0.0, 0.1, 0.0].into_iter().enumerate() {
        let values = floats(&rest[env * one + images..(env + 1) * one]);
        assert!(values.iter().all(|v| v.is_finite()));
        assert!((values[12 + time] - expected).abs() < 1e-6);
    }
    assert!(rest[3 * one..].iter().all(|class| *class <= 7));

    let error = serve(&b"X"[..], Vec::new(), &config).unwrap_err();
    assert!(error.to_string().contains("0x58"), "{error}");
}
