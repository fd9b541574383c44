//! Tasks and their words.
//!
//! Phrases are what a policy hears; [`Task::from_instruction`] is for the ground truth only.

use rand::RngExt;
use serde::{Deserialize, Serialize};

/// Colour of a cube.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Colour {
    /// Red.
    Red,
    /// Green.
    Green,
    /// Blue.
    Blue,
    /// Yellow.
    Yellow,
}

impl Colour {
    /// All colours, in the order of their indices.
    pub const ALL: [Colour; 4] = [Colour::Red, Colour::Green, Colour::Blue, Colour::Yellow];

    /// Index in [`Colour::ALL`].
    pub fn index(self) -> usize {
        self as usize
    }

    /// The word for it.
    pub fn name(self) -> &'static str {
        ["red", "green", "blue", "yellow"][self.index()]
    }
}

/// Which bin: left is y > 0, right is y < 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BinSide {
    /// The bin at y > 0.
    Left,
    /// The bin at y < 0.
    Right,
}

impl BinSide {
    /// Both bins, in the order of their indices.
    pub const ALL: [BinSide; 2] = [BinSide::Left, BinSide::Right];

    /// Index in [`BinSide::ALL`].
    pub fn index(self) -> usize {
        self as usize
    }

    /// The word for it.
    pub fn name(self) -> &'static str {
        ["left", "right"][self.index()]
    }
}

/// What the arm is asked to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "task")]
pub enum Task {
    /// Put the cube of this colour in this bin.
    PickPlace {
        /// Which cube.
        colour: Colour,
        /// Which bin.
        bin: BinSide,
    },
    /// Touch the cube of this colour.
    Touch {
        /// Which cube.
        colour: Colour,
    },
}

/// Templates of pick-place instructions; the first is the canonical one.
pub const PICK_PLACE_PHRASES: [&str; 8] = [
    "put the {colour} cube in the {bin} bin",
    "place the {colour} cube into the {bin} bin",
    "pick up the {colour} cube and drop it in the {bin} bin",
    "move the {colour} block to the {bin} bin",
    "take the {colour} cube and put it in the bin on the {bin}",
    "the {colour} cube goes in the {bin} box",
    "grab the {colour} block and place it in the {bin} container",
    "please put the {colour} one into the {bin} bin",
];

/// Templates of touch instructions; the first is the canonical one.
pub const TOUCH_PHRASES: [&str; 8] = [
    "touch the {colour} cube",
    "tap the {colour} cube",
    "reach for the {colour} cube and touch it",
    "touch the {colour} block",
    "point at the {colour} cube and touch it",
    "tap the top of the {colour} block",
    "please touch the {colour} one",
    "bring the fingers onto the {colour} cube and touch it",
];

impl Task {
    /// The colour of the cube it is about.
    pub fn colour(self) -> Colour {
        match self {
            Task::PickPlace { colour, .. } | Task::Touch { colour } => colour,
        }
    }

    /// The bin it is about; `None` for a touch.
    pub fn bin(self) -> Option<BinSide> {
        match self {
            Task::PickPlace { bin, .. } => Some(bin),
            Task::Touch { .. } => None,
        }
    }

    /// The instruction in phrase `phrase` (counted modulo the templates); 0 is the canonical one.
    pub fn instruction(self, phrase: usize) -> String {
        match self {
            Task::PickPlace { colour, bin } => PICK_PLACE_PHRASES
                [phrase % PICK_PLACE_PHRASES.len()]
            .replace("{colour}", colour.name())
            .replace("{bin}", bin.name()),
            Task::Touch { colour } => {
                TOUCH_PHRASES[phrase % TOUCH_PHRASES.len()].replace("{colour}", colour.name())
            }
        }
    }

    /// The task that an instruction names: one colour and either a side or a verb of touching.
    ///
    /// `None` when a word is missing or two contradict each other.
    pub fn from_instruction(instruction: &str) -> Option<Task> {
        let lower = instruction.to_lowercase();
        let words: Vec<&str> =
            lower.split(|c: char| !c.is_alphanumeric()).filter(|w| !w.is_empty()).collect();
        let has = |word: &str| words.contains(&word);
        let only = |count: usize| count == 1;
        let colours: Vec<Colour> = Colour::ALL.into_iter().filter(|c| has(c.name())).collect();
        let bins: Vec<BinSide> = BinSide::ALL.into_iter().filter(|b| has(b.name())).collect();
        if !only(colours.len()) || bins.len() > 1 {
            return None;
        }
        let touches = ["touch", "tap"].iter().any(|w| has(w));
        let colour = colours[0];
        match bins.first() {
            Some(&bin) if !touches => Some(Task::PickPlace { colour, bin }),
            None if touches => Some(Task::Touch { colour }),
            _ => None,
        }
    }

    /// A pick-place or touch task for one of the `present` colours; what is `None` is drawn.
    pub fn draw(
        random: &mut impl RngExt,
        present: &[Colour],
        touch: bool,
        colour: Option<Colour>,
        bin: Option<BinSide>,
    ) -> Task {
        let drawn_colour = present[random.random_range(0..present.len())];
        let drawn_bin = BinSide::ALL[random.random_range(0..2)];
        let colour = colour.unwrap_or(drawn_colour);
        if touch {
            Task::Touch { colour }
        } else {
            Task::PickPlace { colour, bin: bin.unwrap_or(drawn_bin) }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_phrase_reads_back_as_its_task() {
        for colour in Colour::ALL {
            for phrase in 0..8 {
                let touch = Task::Touch { colour };
                assert_eq!(Task::from_instruction(&touch.instruction(phrase)), Some(touch));
                for bin in BinSide::ALL {
                    let task = Task::PickPlace { colour, bin };
                    let text = task.instruction(phrase);
                    assert_eq!(Task::from_instruction(&text), Some(task), "{text}");
                }
            }
        }
    }

    #[test]
    fn unclear_instructions_name_no_task() {
        for text in ["", "put the cube in the left bin", "put the red and blue cube left", "red"] {
            assert_eq!(Task::from_instruction(text), None, "{text}");
        }
        let loud = "PUT the Red cube, in the LEFT bin!";
        let task = Task::PickPlace { colour: Colour::Red, bin: BinSide::Left };
        assert_eq!(Task::from_instruction(loud), Some(task));
    }
}
