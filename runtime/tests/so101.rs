//! The SO-101 arm from its public URDF against poses and Jacobians that MuJoCo computed from its own model.

use std::path::{Path, PathBuf};

use nalgebra::{Isometry3, Quaternion, Translation3, UnitQuaternion, Vector3};
use sinew_runtime::JointVec;
use sinew_runtime::kinematics::{ArmModel, Pose, urdf};

/// The arm's model and its golden poses, when they are there.
fn data() -> Option<PathBuf> {
    let root = std::env::var_os("SINEW_DATA").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/data"),
        PathBuf::from,
    );
    let path = root.join("so101_model");
    if path.is_dir() {
        return Some(path);
    }
    println!("skipped: {} is not there; SINEW_DATA names its parent folder", path.display());
    None
}

struct Golden {
    angles: Vec<f64>,
    tip: Isometry3<f64>,
    /// By axis, then by joint: velocity of the tip, turning.
    jacobians: [Vec<Vec<f64>>; 2],
}

fn read(folder: &Path) -> (ArmModel, Vec<Golden>) {
    let text = std::fs::read_to_string(folder.join("fk_golden.json")).expect("it is there");
    let golden: serde_json::Value = serde_json::from_str(&text).expect("it is JSON");
    let joints: Vec<String> =
        serde_json::from_value(golden["joints"].clone()).expect("names in order");
    let file = folder.join("so101_new_calib.urdf");
    let arm = urdf::read(&file, &joints, None, "gripper_frame_link").expect("a sound URDF");
    let list =
        |v: &serde_json::Value| -> Vec<f64> { serde_json::from_value(v.clone()).expect("numbers") };
    let samples = golden["samples"].as_array().expect("a list").iter().map(|s| {
        let (at, turn) = (list(&s["pos"]), list(&s["quat_wxyz"]));
        let rows = |key: &str| serde_json::from_value(s[key].clone()).expect("a matrix");
        Golden {
            angles: list(&s["q"]),
            tip: Isometry3::from_parts(
                Translation3::new(at[0], at[1], at[2]),
                UnitQuaternion::new_normalize(Quaternion::new(turn[0], turn[1], turn[2], turn[3])),
            ),
            jacobians: [rows("jac_pos"), rows("jac_rot")],
        }
    });
    (arm, samples.collect())
}

#[test]
fn poses_and_jacobians_are_those_of_mujoco() {
    let Some(folder) = data() else { return };
    let (arm, golden) = read(&folder);
    assert!(golden.len() >= 100);
    // MuJoCo's file has its angles to six digits, the URDF π to six: a tool 30 cm away differs by micrometres.
    let mut worst = [0.0f64; 4];
    // The URDF's tool frame stands at the same point as MuJoCo's site, turned by a fixed rotation.
    let rotation = |angles: &[f64]| arm.tip_at(angles, &mut Pose::default()).rotation;
    let turned = rotation(&golden[0].angles).inverse() * golden[0].tip.rotation;
    for sample in &golden {
        let mut pose = Pose::default();
        let tip = arm.tip_at(&sample.angles, &mut pose);
        let columns = arm.jacobian(&pose, &tip);
        let apart = (tip.translation.vector - sample.tip.translation.vector).norm();
        worst[0] = worst[0].max(apart);
        worst[1] = worst[1].max((tip.rotation * turned).angle_to(&sample.tip.rotation));
        for (k, joint) in arm.chain.joints().iter().enumerate() {
            for axis in 0..3 {
                let (shift, turn) = (&sample.jacobians[0], &sample.jacobians[1]);
                worst[2] = worst[2].max((columns[k][axis] - shift[axis][joint.index]).abs());
                worst[3] = worst[3].max((columns[k][axis + 3] - turn[axis][joint.index]).abs());
            }
        }
    }
    println!(
        "position {:.1e} m, rotation {:.1e} rad, Jacobians {:.1e}, {:.1e}",
        worst[0], worst[1], worst[2], worst[3]
    );
    assert!(worst[0] < 5e-6 && worst[1] < 5e-5 && worst[2] < 1e-5 && worst[3] < 5e-5, "{worst:?}");
}

#[test]
fn poses_near_by_are_found_again_within_the_limits() {
    let Some(folder) = data() else { return };
    let (arm, golden) = read(&folder);
    let reach = JointVec::from_slice(&[0.6; 6]).expect("six joints");
    let mut worst = (0.0f64, 0.0f64);
    for sample in &golden {
        // From a pose some way off, as the action before would be.
        let offset = [0.15, -0.1, 0.12, -0.15, 0.1, 0.0];
        let from: Vec<f64> = (sample.angles.iter().zip(offset).zip(&arm.limits))
            .map(|((q, d), (lower, upper))| (q + d).clamp(*lower, *upper))
            .collect();
        let from = JointVec::from_slice(&from).expect("six joints");
        let mut pose = Pose::default();
        let target = arm.tip_at(&sample.angles, &mut pose);
        let found = arm.solve(&target, &from, &reach);
        let tip = arm.tip_at(found.angles.as_slice(), &mut pose);
        let left = (tip.translation.vector - target.translation.vector).norm();
        assert!((left - found.position_error).abs() < 1e-9, "it says how far it is");
        worst = (worst.0.max(found.position_error), worst.1.max(found.rotation_error));
        for (index, (lower, upper)) in arm.limits.iter().enumerate().take(5) {
            let (at, before) = (found.angles[index], from[index]);
            assert!(at >= *lower && at <= *upper && (at - before).abs() <= 0.6 + 1e-12);
        }
    }
    println!("position {:.1e} m, rotation {:.1e} rad", worst.0, worst.1);
    assert!(worst.0 < 1e-4 && worst.1 < 1e-3, "{worst:?}");
}

#[test]
fn a_straight_line_is_followed_without_jumps() {
    let Some(folder) = data() else { return };
    let (arm, _) = read(&folder);
    let start = JointVec::from_slice(&[0.0, -0.3, 0.5, 0.6, 0.0, 0.0]).expect("six joints");
    let reach = JointVec::from_slice(&[0.2; 6]).expect("six joints");
    let mut pose = Pose::default();
    let first = arm.tip_at(start.as_slice(), &mut pose);
    let mut angles = start;
    for k in 1..=60 {
        // 12 cm towards the base and up, 2 mm a step.
        let way = Vector3::new(-0.0018, 0.0, 0.0009) * f64::from(k);
        let target = Isometry3::from_parts((first.translation.vector + way).into(), first.rotation);
        let found = arm.solve(&target, &angles, &reach);
        assert!(found.position_error < 1e-3, "step {k}: {} m", found.position_error);
        let most = (0..5).map(|j| (found.angles[j] - angles[j]).abs()).fold(0.0, f64::max);
        assert!(most < 0.1, "step {k}: {most} rad");
        angles = found.angles;
    }
}
