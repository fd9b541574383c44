//! Bit for bit: where two results differ first.

use serde::Serialize;
use serde_json::Value;
use sinew_runtime::control::Cycle;
use sinew_runtime::{ActionChunk, ChunkRequest, JointVec, Stamp};

/// The first thing that came out otherwise.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Difference {
    /// Control cycle, from 1.
    pub cycle: u64,
    /// Its time.
    pub stamp: Stamp,
    /// What differs, such as `command.position[2] (elbow)`.
    pub field: String,
    /// As recorded.
    pub recorded: String,
    /// As it came out now.
    pub replayed: String,
}

/// What differs: field, as recorded, as replayed.
pub(super) type Found = (String, String, String);

/// Where two cycles differ; the order's and command's numbers are compared in 32 bits, as they are recorded.
pub(super) fn cycles(recorded: &Cycle, replayed: &Cycle, joints: &[String]) -> Option<Found> {
    let (before, now) = (recorded.command, replayed.command);
    if before.is_some() != now.is_some() {
        let said = |c: bool| if c { "a command" } else { "none" }.to_owned();
        return Some(("command".to_owned(), said(before.is_some()), said(now.is_some())));
    }
    if let (Some(before), Some(now)) = (before, now) {
        let (a, b) = (before.sequence as u32, now.sequence as u32);
        if a != b {
            return Some(("command.sequence".to_owned(), a.to_string(), b.to_string()));
        }
        if before.stamp != now.stamp {
            let text = |s: Stamp| s.0.to_string();
            return Some(("command.stamp".to_owned(), text(before.stamp), text(now.stamp)));
        }
        let vectors = [
            ("command.position", before.position, now.position),
            ("command.velocity", before.velocity, now.velocity),
        ];
        for (name, before, now) in vectors {
            if let Some(found) = vector(name, &before, &now, joints) {
                return Some(found);
            }
        }
    }
    let rest = |cycle: &Cycle| Cycle { command: None, ..*cycle };
    let (before, now) = (rest(recorded), rest(replayed));
    if before == now { None } else { values(&before, &now) }
}

fn vector(name: &str, before: &JointVec, now: &JointVec, joints: &[String]) -> Option<Found> {
    let (before, now) = (before.as_slice(), now.as_slice());
    if before.len() != now.len() {
        return Some((name.to_owned(), before.len().to_string(), now.len().to_string()));
    }
    let at = before.iter().zip(now).position(|(a, b)| a.to_bits() != b.to_bits())?;
    let joint = joints.get(at).map(|j| format!(" ({j})")).unwrap_or_default();
    Some((format!("{name}[{at}]{joint}"), before[at].to_string(), now[at].to_string()))
}

/// Where two chunks differ.
pub(super) fn chunks(
    recorded: &ActionChunk,
    made: &ActionChunk,
    joints: &[String],
) -> Option<Found> {
    let head = |c: &ActionChunk| (c.request, c.instant.0, c.dt, c.dim(), c.horizon());
    let name = |rest: &str| format!("chunk {}: {rest}", recorded.request);
    if head(recorded) != head(made) {
        let text = |c| format!("{:?}", head(c));
        let field = name("(request, instant, dt, dim, horizon)");
        return Some((field, text(recorded), text(made)));
    }
    let (before, now) = (recorded.values(), made.values());
    let at = before.iter().zip(now).position(|(a, b)| a.to_bits() != b.to_bits())?;
    let (action, joint) = (at / recorded.dim(), at % recorded.dim());
    let joint = joints.get(joint).cloned().unwrap_or_else(|| joint.to_string());
    Some((name(&format!("action {action}, {joint}")), before[at].to_string(), now[at].to_string()))
}

/// Where two requests differ.
pub(super) fn requests(recorded: &ChunkRequest, made: &ChunkRequest) -> Option<Found> {
    if recorded == made {
        return None;
    }
    let (field, before, now) = values(recorded, made)?;
    Some((format!("request {}: {field}", recorded.id), before, now))
}

/// Where two values differ in their JSON forms, which tell apart all finite numbers.
pub(super) fn values<T: Serialize>(recorded: &T, replayed: &T) -> Option<Found> {
    let json = |v: &T| serde_json::to_value(v).unwrap_or_default();
    walk("", &json(recorded), &json(replayed))
}

fn walk(path: &str, before: &Value, now: &Value) -> Option<Found> {
    let below = |key: &str| if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") };
    match (before, now) {
        (Value::Object(a), Value::Object(b)) if a.keys().eq(b.keys()) => {
            a.iter().find_map(|(key, value)| walk(&below(key), value, b.get(key)?))
        }
        (Value::Array(a), Value::Array(b)) if a.len() == b.len() => {
            a.iter().zip(b).enumerate().find_map(|(k, (x, y))| walk(&format!("{path}[{k}]"), x, y))
        }
        (a, b) => {
            let (a, b) = (a.to_string(), b.to_string());
            (a != b).then(|| (path.to_owned(), a, b))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn the_last_bit_of_one_value_is_found_and_named() {
        let chunk = |values| {
            ActionChunk::new(7, Stamp(1), Duration::from_millis(50), 2, values).expect("whole rows")
        };
        let values = vec![0.1, 0.2, 0.3, -0.0];
        let mut other = values.clone();
        other[3] = 0.0;
        let joints = ["pan".to_owned(), "lift".to_owned()];
        assert_eq!(chunks(&chunk(values.clone()), &chunk(values.clone()), &joints), None);
        let found = chunks(&chunk(values), &chunk(other), &joints).expect("-0 is not 0");
        assert_eq!(found, ("chunk 7: action 1, lift".into(), "-0".into(), "0".into()));
    }

    #[test]
    fn a_nested_field_is_named_by_its_path() {
        let a = serde_json::json!({ "order": { "request": 3, "list": [1, 2.5] }, "z": null });
        let mut b = a.clone();
        b["order"]["list"][1] = serde_json::json!(2.500_000_000_000_000_4);
        let found = values(&a, &b).expect("one bit");
        assert_eq!(found.0, "order.list[1]");
        assert_eq!(values(&a, &a), None);
    }
}
