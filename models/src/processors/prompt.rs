//! The state written into the instruction.
//!
//! Source: LeRobot `src/lerobot/policies/pi05/processor_pi05.py` and `pi0_fast/processor_pi0_fast.py`.

/// How a policy that reads its state as text is prompted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StatePrompt {
    /// `Task: …, State: …;\nAction: ` (π0.5).
    TaskStateAction,
    /// `Task: …, State: …;\n` (π0-FAST): `Action: ` is the first thing it says.
    TaskState,
}

/// Bins of the state, over [−1, 1].
const BINS: f64 = 256.0;

/// The bin of a normalised state value: 0 to 255, and −1 below the range.
pub fn state_bin(value: f32) -> i32 {
    // The edges are multiples of 1/128, so this is exact. Whatever lies above is in the last bin.
    let bin = ((f64::from(value) + 1.0) * BINS / 2.0).floor();
    bin.clamp(-1.0, BINS - 1.0) as i32
}

impl StatePrompt {
    /// The prompt of `instruction` and the normalised `state`.
    pub fn text(self, instruction: &str, state: &[f32]) -> String {
        let task = instruction.trim().replace(['_', '\n'], " ");
        let bins: Vec<String> = state.iter().map(|v| state_bin(*v).to_string()).collect();
        let end = match self {
            Self::TaskStateAction => "Action: ",
            Self::TaskState => "",
        };
        format!("Task: {task}, State: {};\n{end}", bins.join(" "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bins_have_their_lower_edge() {
        let bins = [-1.01, -1.0, -0.992_187_5, 0.0, 0.992_187, 0.992_188, 7.0].map(state_bin);
        assert_eq!(bins, [-1, 0, 1, 128, 254, 255, 255]);
    }

    #[test]
    fn prompts_are_cleaned() {
        let text = StatePrompt::TaskState.text("  pick_up\nit ", &[0.5, -2.0]);
        assert_eq!(text, "Task: pick up it, State: 192 -1;\n");
        assert!(StatePrompt::TaskStateAction.text("a", &[]).ends_with(", State: ;\nAction: "));
    }
}
