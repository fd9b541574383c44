//! Action spaces: what the model's channels mean.
//!
//! Source: LeRobot 0.6.1 `src/lerobot/policies/xvla/action_hub.py`.

use std::path::Path;

use crate::ModelError;

/// Width of the spaces that are made for 20 channels.
const WIDE: usize = 20;

/// What the model's channels mean.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ActionSpace {
    /// Channels that the model works with.
    width: usize,
    /// Channels that are the robot's, from the first on.
    real: usize,
    /// Gripper channels: the model never sees them, and gives their logits.
    grippers: Vec<usize>,
    /// Whether the state is laid out as the action is, so that its grippers are hidden too.
    state_grippers: bool,
}

/// Names of the spaces.
pub(super) const NAMES: [&str; 6] =
    ["auto", "ee6d", "joint", "agibot_ee6d", "franka_joint7", "so101_bimanual"];

impl ActionSpace {
    /// The space called `name`, for an action of `action_dim` values; `max_dim` is the width that `auto` works at.
    ///
    /// # Errors
    /// [`ModelError::Config`] naming the key; `path` is for messages.
    pub fn named(
        name: &str,
        action_dim: usize,
        max_dim: usize,
        path: &Path,
    ) -> Result<Self, ModelError> {
        let fixed = |width, real, grippers: &[usize]| Self {
            width,
            real,
            grippers: grippers.to_vec(),
            state_grippers: !grippers.is_empty(),
        };
        let space = match name.to_lowercase().as_str() {
            // Two arms, each: position (3), first two columns of the rotation matrix (6), gripper.
            "ee6d" => fixed(WIDE, WIDE, &[9, 19]),
            "agibot_ee6d" => fixed(WIDE, WIDE, &[]),
            // Two arms, each: six joints, gripper.
            "joint" => fixed(14, 14, &[6, 13]),
            "franka_joint7" => fixed(WIDE, 7, &[]),
            // Two arms, each: five joints, gripper.
            "so101_bimanual" => fixed(WIDE, 12, &[5, 11]),
            "auto" if action_dim <= max_dim => fixed(max_dim, action_dim, &[]),
            "auto" => {
                let reason = format!("has {action_dim} values, max_action_dim is {max_dim}");
                return Err(ModelError::config(path, "action", reason));
            }
            _ => {
                let known = NAMES.join(", ");
                let reason = format!("is `{name}`, expected one of {known}");
                return Err(ModelError::config(path, "action_mode", reason));
            }
        };
        Ok(space)
    }

    /// Channels `M` that the model works with.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Values of an action.
    pub fn action_dim(&self) -> usize {
        self.real
    }

    /// Gripper channels, which the result has as an opening between 0 and 1.
    pub fn grippers(&self) -> &[usize] {
        &self.grippers
    }

    /// Hides the grippers in `state`, padded to its full width.
    pub fn hide_in_state(&self, state: &mut [f32]) {
        if self.state_grippers {
            self.hide(state);
        }
    }

    /// 1 for each channel that the model sees, 0 for its grippers.
    pub fn seen(&self) -> Vec<f32> {
        let mut seen = vec![1.0; self.width];
        self.hide(&mut seen);
        seen
    }

    /// Hides the grippers in a row of channels.
    fn hide(&self, channels: &mut [f32]) {
        for gripper in &self.grippers {
            if let Some(value) = channels.get_mut(*gripper) {
                *value = 0.0;
            }
        }
    }

    /// The action in the row `channels` of a result.
    pub fn action<'a>(&'a self, channels: &'a [f32]) -> impl Iterator<Item = f32> + 'a {
        channels.iter().take(self.real).enumerate().map(|(i, value)| {
            if self.grippers.contains(&i) { 1.0 / (1.0 + (-value).exp()) } else { *value }
        })
    }

    /// The row of a sample that gives `action`; grippers and unused channels are zero.
    pub fn channels(&self, action: impl Iterator<Item = f32>) -> Vec<f32> {
        let mut row: Vec<f32> = action.take(self.real).collect();
        row.resize(self.width, 0.0);
        self.hide(&mut row);
        row
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space(name: &str) -> ActionSpace {
        ActionSpace::named(name, 6, 10, Path::new("config.json")).expect("the name is known")
    }

    #[test]
    fn every_name_has_its_widths() {
        let widths: Vec<_> =
            NAMES.iter().map(|n| (space(n).width(), space(n).action_dim())).collect();
        assert_eq!(widths, [(10, 6), (20, 20), (14, 14), (20, 20), (20, 7), (20, 12)]);
        let error = ActionSpace::named("polar", 6, 10, Path::new("config.json")).expect_err("new");
        assert!(error.to_string().contains("action_mode"), "{error}");
        let error = ActionSpace::named("auto", 11, 10, Path::new("config.json")).expect_err("wide");
        assert!(error.to_string().contains("max_action_dim"), "{error}");
    }

    #[test]
    fn grippers_are_hidden_from_the_model_and_come_out_as_openings() {
        let ee6d = space("ee6d");
        let mut row = vec![2.0f32; 20];
        ee6d.hide(&mut row);
        assert!(row.iter().enumerate().all(|(i, v)| (*v == 0.0) == [9, 19].contains(&i)));
        let out: Vec<f32> = ee6d.action(&row).collect();
        assert_eq!((out[9], out[8]), (0.5, 2.0));
        let planned = ee6d.channels(out.iter().copied());
        assert_eq!(planned, row, "a plan's grippers are hidden too");
        let mut short = vec![1.0f32; 3];
        ee6d.hide_in_state(&mut short);
        assert_eq!(short, [1.0; 3], "a state without grippers has none to hide");
        let mut state = vec![1.0f32; 20];
        space("agibot_ee6d").hide_in_state(&mut state);
        assert_eq!(state, [1.0; 20]);
    }
}
