//! The guard's space in a launch file: a workspace box, further planes, self-collision.

use serde::Serialize;
use sinew_runtime::guard::SpaceConfig;
use sinew_runtime::units::parse_length;
use toml::Spanned;

use super::checker::Checker;
use super::schema;

/// Where the arm may be, beside what its description says.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SpaceSettings {
    /// Half-spaces that the arm stays in: the workspace's faces and the planes.
    pub half_spaces: Vec<HalfSpace>,
    /// Parts of the arm are kept apart.
    pub self_collision: bool,
    /// How fast the speed towards a limit falls with the distance (1/s).
    pub barrier_rate: f64,
}

/// Points where `normal · point >= offset`, in the base's frame.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct HalfSpace {
    /// What it stands for.
    pub name: String,
    /// Unit vector to where the arm may be.
    pub normal: [f64; 3],
    /// Distance from the origin along the normal (m).
    pub offset: f64,
}

pub(super) fn resolve(check: &mut Checker, guard: &schema::Guard) -> SpaceSettings {
    let mut half_spaces = Vec::new();
    if let Some(workspace) = &guard.workspace {
        let sides = workspace.get_ref();
        let axes = [("x", &sides.x), ("y", &sides.y), ("z", &sides.z)];
        for (axis, (name, side)) in axes.iter().enumerate() {
            let Some([from, to]) = side else { continue };
            let (Some(from), Some(to)) =
                (length(check, workspace, from), length(check, workspace, to))
            else {
                continue;
            };
            if from >= to {
                let problem = format!("{name} is empty: {from} m to {to} m");
                check.report("guard.workspace", workspace, problem, "the lower side comes first");
            }
            for (sign, offset, end) in [(1.0, from, "from"), (-1.0, -to, "to")] {
                let mut normal = [0.0; 3];
                normal[axis] = sign;
                half_spaces.push(HalfSpace {
                    name: format!("workspace {name} {end}"),
                    normal,
                    offset,
                });
            }
        }
    }
    for (number, plane) in guard.planes.iter().enumerate() {
        let schema::Plane { normal, offset } = plane.get_ref();
        let size = normal.iter().map(|v| v * v).sum::<f64>().sqrt();
        if !(size > 1e-6 && size.is_finite()) {
            let remedy = "write it like [0.0, 0.0, 1.0]: to where the arm may be";
            check.report("guard.planes", plane, "the normal is no direction", remedy);
            continue;
        }
        if let Some(offset) = length(check, plane, offset) {
            let name = format!("plane {}", number + 1);
            half_spaces.push(HalfSpace { name, normal: normal.map(|v| v / size), offset });
        }
    }
    let barrier_rate = match &guard.barrier_rate {
        Some(at) => check.frequency("guard.barrier_rate", at, 0.5, 50.0),
        None => SpaceConfig::RATE,
    };
    let self_collision = guard.self_collision.unwrap_or(true);
    SpaceSettings { half_spaces, self_collision, barrier_rate }
}

fn length<T>(check: &mut Checker, at: &Spanned<T>, text: &str) -> Option<f64> {
    match parse_length(text) {
        Ok(length) => Some(length),
        Err(problem) => {
            check.report("guard", at, problem, "");
            None
        }
    }
}
