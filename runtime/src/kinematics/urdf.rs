//! A kinematic model from a URDF: the revolute joints between a base link and a tip link.
//!
//! Only kinematics are read: joints, their origins (m, rad), axes, position limits. Meshes, masses and
//! transmissions are skipped. Source: <http://wiki.ros.org/urdf/XML/joint>.
//!
//! `roxmltree` and not `urdf-rs`: it keeps a flat tree and no document types, so a hostile file cannot nest
//! or expand its way through the stack.

use std::path::Path;

use nalgebra::{Isometry3, Translation3, Unit, UnitQuaternion, Vector3};
use roxmltree::{Document, Node, ParsingOptions};

use super::{ArmModel, Chain, ChainJoint};
use crate::MAX_JOINTS;

/// Largest file that is read (bytes), and the most XML nodes in it.
const MOST_BYTES: u64 = 8 << 20;
const MOST_NODES: u32 = 200_000;

/// Why a URDF gives no model.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UrdfError {
    /// The file cannot be read.
    #[error("{path}: {reason}")]
    File {
        /// Its path.
        path: String,
        /// Why.
        reason: String,
    },
    /// Not XML, or no `<robot>`.
    #[error("it is no URDF: {0}")]
    Syntax(String),
    /// A joint that cannot be used.
    #[error("joint `{joint}`: {reason}")]
    Joint {
        /// Its name.
        joint: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A link that is not there, or not on one line with the base.
    #[error("link `{link}`: {reason}")]
    Link {
        /// Its name.
        link: String,
        /// What is wrong with it.
        reason: String,
    },
}

/// A joint as it is written, as far as it is used here.
struct UrdfJoint<'a> {
    name: &'a str,
    parent: &'a str,
    child: &'a str,
    node: Node<'a, 'a>,
}

/// The model of the arm with `joints` (names, in bus order) in the file `path`, from `base` (left out: the
/// tree's root) to `tip`.
///
/// # Errors
/// [`UrdfError`] naming the file, the joint or the link.
pub fn read(
    path: &Path,
    joints: &[String],
    base: Option<&str>,
    tip: &str,
) -> Result<ArmModel, UrdfError> {
    let fail = |reason: String| UrdfError::File { path: path.display().to_string(), reason };
    let size = std::fs::metadata(path).map_err(|e| fail(e.to_string()))?.len();
    if size > MOST_BYTES {
        return Err(fail(format!("{size} bytes are more than a URDF needs ({MOST_BYTES})")));
    }
    let text = std::fs::read_to_string(path).map_err(|e| fail(e.to_string()))?;
    parse(&text, joints, base, tip)
}

/// As [`read`], of the URDF's text.
///
/// # Errors
/// [`UrdfError`] naming the joint or the link.
pub fn parse(
    text: &str,
    joints: &[String],
    base: Option<&str>,
    tip: &str,
) -> Result<ArmModel, UrdfError> {
    let options = ParsingOptions { nodes_limit: MOST_NODES, ..ParsingOptions::default() };
    let document = Document::parse_with_options(text, options)
        .map_err(|e| UrdfError::Syntax(e.to_string()))?;
    let robot = document.root_element();
    if robot.tag_name().name() != "robot" {
        return Err(UrdfError::Syntax(format!(
            "its element is <{}>, expected <robot>",
            robot.tag_name().name()
        )));
    }
    // A <joint> within a <transmission> or <gazebo> is another thing.
    let found = robot.children().filter(|n| n.has_tag_name("joint"));
    let found: Vec<UrdfJoint<'_>> = found.map(UrdfJoint::read).collect::<Result<_, _>>()?;
    let links: Vec<&str> = robot
        .children()
        .filter(|n| n.has_tag_name("link"))
        .filter_map(|n| n.attribute("name"))
        .collect();
    for name in base.into_iter().chain([tip]) {
        if !links.contains(&name) {
            let reason = format!("the URDF has no such link; it has: {}", links.join(", "));
            return Err(UrdfError::Link { link: name.to_owned(), reason });
        }
    }
    let path = path_to(tip, base, &found)?;

    let mut chain = Vec::new();
    let mut limits = [(0.0, 0.0); MAX_JOINTS];
    let mut origin = Isometry3::identity();
    for joint in path {
        origin *= joint.origin()?;
        match joint.node.attribute("type").unwrap_or_default() {
            "fixed" => {}
            kind @ ("revolute" | "continuous") => {
                if joint.child_node("mimic").is_some() {
                    return Err(joint.error("it mimics another joint, which no motor can do alone"));
                }
                let index = joints.iter().position(|n| n == joint.name).ok_or_else(|| {
                    let known = joints.join(", ");
                    joint.error(format!("the arm has no joint of this name; it has: {known}"))
                })?;
                if index >= MAX_JOINTS || chain.len() >= MAX_JOINTS {
                    return Err(joint.error(format!("an arm has at most {MAX_JOINTS} joints")));
                }
                limits[index] = if kind == "continuous" {
                    (f64::NEG_INFINITY, f64::INFINITY)
                } else {
                    joint.limits()?
                };
                chain.push(ChainJoint { origin, axis: joint.axis()?, index });
                origin = Isometry3::identity();
            }
            other => {
                return Err(joint.error(format!(
                    "its type is `{other}`; revolute, continuous and fixed joints can be used"
                )));
            }
        }
    }
    let chain = Chain::new(chain).map_err(|e| UrdfError::Link {
        link: tip.to_owned(),
        reason: format!("the way to it from the base makes no arm: {e}"),
    })?;
    let limits = limits[..joints.len().min(MAX_JOINTS)].to_vec();
    Ok(ArmModel { chain, tip: origin, limits, lever: ArmModel::LEVER })
}

/// The joints from `base` (or the root) to `tip`, from the base outwards.
fn path_to<'j, 'a>(
    tip: &str,
    base: Option<&str>,
    joints: &'j [UrdfJoint<'a>],
) -> Result<Vec<&'j UrdfJoint<'a>>, UrdfError> {
    let mut path = Vec::new();
    let mut link = tip;
    while base != Some(link) {
        let Some(joint) = joints.iter().find(|j| j.child == link) else { break };
        // In a tree a way has each joint once.
        if path.len() == joints.len() {
            return Err(joint.error("it is part of a loop"));
        }
        path.push(joint);
        link = joint.parent;
    }
    if let Some(base) = base
        && link != base
    {
        let reason = format!("it does not hang on the base `{base}` but on `{link}`");
        return Err(UrdfError::Link { link: tip.to_owned(), reason });
    }
    path.reverse();
    Ok(path)
}

impl<'a> UrdfJoint<'a> {
    fn read(node: Node<'a, 'a>) -> Result<Self, UrdfError> {
        let name = node.attribute("name").unwrap_or("(without a name)");
        let end = |tag: &str| {
            let found = node.children().find(|n| n.has_tag_name(tag));
            found.and_then(|n| n.attribute("link")).ok_or_else(|| UrdfError::Joint {
                joint: name.to_owned(),
                reason: format!("<{tag} link=\"…\"/> is missing"),
            })
        };
        Ok(Self { name, parent: end("parent")?, child: end("child")?, node })
    }

    fn error(&self, reason: impl Into<String>) -> UrdfError {
        UrdfError::Joint { joint: self.name.to_owned(), reason: reason.into() }
    }

    fn child_node(&self, tag: &str) -> Option<Node<'a, 'a>> {
        self.node.children().find(|n| n.has_tag_name(tag))
    }

    fn vector(&self, tag: &str, key: &str, default: [f64; 3]) -> Result<Vector3<f64>, UrdfError> {
        let Some(text) = self.child_node(tag).and_then(|n| n.attribute(key)) else {
            return Ok(default.into());
        };
        let parsed: Option<Vec<f64>> = text.split_whitespace().map(|v| v.parse().ok()).collect();
        match parsed.as_deref() {
            Some(&[x, y, z]) if [x, y, z].iter().all(|v| v.is_finite() && v.abs() < 1e3) => {
                Ok(Vector3::new(x, y, z))
            }
            _ => {
                Err(self.error(format!("{tag} {key} = \"{text}\" is not three numbers below 1000")))
            }
        }
    }

    fn origin(&self) -> Result<Isometry3<f64>, UrdfError> {
        let at = self.vector("origin", "xyz", [0.0; 3])?;
        let turn = self.vector("origin", "rpy", [0.0; 3])?;
        let rotation = UnitQuaternion::from_euler_angles(turn.x, turn.y, turn.z);
        Ok(Isometry3::from_parts(Translation3::from(at), rotation))
    }

    fn axis(&self) -> Result<Unit<Vector3<f64>>, UrdfError> {
        let axis = self.vector("axis", "xyz", [1.0, 0.0, 0.0])?;
        Unit::try_new(axis, 1e-6).ok_or_else(|| self.error("its axis is no direction"))
    }

    fn limits(&self) -> Result<(f64, f64), UrdfError> {
        let limit = self
            .child_node("limit")
            .ok_or_else(|| self.error("a revolute joint needs <limit lower=\"…\" upper=\"…\"/>"))?;
        let number = |key: &str| {
            let text = limit.attribute(key).unwrap_or("0");
            text.trim().parse::<f64>().ok().filter(|v| v.is_finite()).ok_or_else(|| {
                self.error(format!("limit {key} = \"{text}\" is no finite number (rad)"))
            })
        };
        let (lower, upper) = (number("lower")?, number("upper")?);
        if lower < upper {
            Ok((lower, upper))
        } else {
            Err(self.error(format!("its lower limit {lower} is not below its upper one {upper}")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kinematics::Pose;

    const URDF: &str = r#"<robot name="two"><link name="base"/><link name="upper"/><link name="fore"/><link name="hand"/>
      <joint name="shoulder" type="revolute"><origin xyz="0 0 0.1" rpy="0 0 0"/><parent link="base"/>
        <child link="upper"/><axis xyz="0 0 2"/><limit lower="-1" upper="1.5" effort="1" velocity="1"/></joint>
      <joint name="elbow" type="continuous"><origin xyz="0.5 0 0"/><parent link="upper"/><child link="fore"/>
        <axis xyz="0 0 1"/></joint>
      <joint name="grasp" type="fixed"><origin xyz="0.25 0 0" rpy="0 1.5707963267948966 0"/><parent link="fore"/>
        <child link="hand"/></joint></robot>"#;

    fn names() -> Vec<String> {
        ["elbow", "shoulder", "gripper"].map(str::to_owned).to_vec()
    }

    #[test]
    fn joints_are_found_by_name_and_fixed_ones_fold_away() {
        let model = parse(URDF, &names(), None, "hand").expect("a sound URDF");
        assert_eq!(model.chain.joints().iter().map(|j| j.index).collect::<Vec<_>>(), [1, 0]);
        assert_eq!(model.limits[1], (-1.0, 1.5));
        assert_eq!(model.limits[0], (f64::NEG_INFINITY, f64::INFINITY));
        let mut pose = Pose::default();
        let tip = model.tip_at(&[0.9, 0.3, 0.0], &mut pose);
        let expected = [
            0.5 * 0.3f64.cos() + 0.25 * 1.2f64.cos(),
            0.5 * 0.3f64.sin() + 0.25 * 1.2f64.sin(),
            0.1,
        ];
        assert!((tip.translation.vector - Vector3::from(expected)).norm() < 1e-12);
        assert!(((tip.rotation * Vector3::x()) + Vector3::z()).norm() < 1e-12);
        let from_upper = parse(URDF, &names(), Some("upper"), "hand").expect("a sound URDF");
        assert_eq!(from_upper.chain.last_link(), 1);
    }

    #[test]
    fn hostile_files_end_in_errors_that_name_the_place() {
        let cases = [
            ("xyz=\"0 0 0.1\"", "xyz=\"0 nan 0.1\"", "shoulder"),
            ("xyz=\"0 0 2\"", "xyz=\"0 0 0\"", "axis is no direction"),
            ("lower=\"-1\"", "lower=\"2\"", "not below"),
            ("lower=\"-1\"", "lower=\"inf\"", "no finite number"),
            ("type=\"continuous\"", "type=\"prismatic\"", "prismatic"),
            ("name=\"elbow\"", "name=\"knee\"", "`knee`"),
            ("<child link=\"fore\"/>", "", "<child"),
            ("<parent link=\"base\"/>", "<parent link=\"hand\"/>", "loop"),
            ("<link name=\"hand\"/>", "", "no such link"),
            ("<robot", "<house", "no URDF"),
            ("<axis xyz=\"0 0 1\"/>", "<axis xyz=\"0 0 1\"/><mimic joint=\"a\"/>", "mimics"),
        ];
        for (from, to, named) in cases {
            let text = URDF.replacen(from, to, 1);
            let text = if to == "<house" { text.replace("</robot>", "</house>") } else { text };
            assert_ne!(text, URDF, "{from}");
            let error = parse(&text, &names(), None, "hand").expect_err(from).to_string();
            assert!(error.contains(named), "{error}");
        }
        let error =
            parse(URDF, &names(), Some("hand"), "fore").expect_err("it hangs the other way");
        assert!(error.to_string().contains("does not hang"), "{error}");
        let nested = "<a>".repeat(300_000);
        assert!(parse(&nested, &names(), None, "hand").is_err());
    }
}
