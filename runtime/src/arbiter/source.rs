//! Names of those who ask: stored in place, so that an event stays `Copy` and the control thread never allocates.

use std::fmt;

/// The longest name (bytes).
pub const MAX_SOURCE: usize = 23;

/// Who asked: a name of printable ASCII, such as `leader-left` or `operator`.
///
/// It is a label that the peer gives itself, not a proof of who it is: shut strangers out at the bus.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Source {
    len: u8,
    name: [u8; MAX_SOURCE],
}

/// A name that cannot be one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no name: use 1 to {MAX_SOURCE} letters, digits, `_`, `-` and `.`")]
pub struct SourceError(String);

impl Source {
    /// The run itself: what the launch asks for without a person.
    pub const RUN: Source = Source::literal("run");
    /// Whoever asked without giving a name.
    pub const UNNAMED: Source = Source::literal("unnamed");

    /// A name that is known when the program is built; cut to [`MAX_SOURCE`] bytes.
    pub const fn literal(text: &str) -> Self {
        let (bytes, mut name, mut len) = (text.as_bytes(), [0; MAX_SOURCE], 0);
        while len < bytes.len() && len < MAX_SOURCE {
            name[len] = bytes[len];
            len += 1;
        }
        Self { len: len as u8, name }
    }

    /// The name `text`.
    ///
    /// # Errors
    /// [`SourceError`] for an empty or long one, or other characters.
    pub fn new(text: &str) -> Result<Self, SourceError> {
        let fits = !text.is_empty()
            && text.len() <= MAX_SOURCE
            && text.chars().all(|c| c.is_ascii_alphanumeric() || "_-.".contains(c));
        if fits { Ok(Self::literal(text)) } else { Err(SourceError(text.to_owned())) }
    }

    /// The name.
    pub fn name(&self) -> &str {
        std::str::from_utf8(&self.name[..usize::from(self.len)]).unwrap_or("?")
    }
}

impl fmt::Debug for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl serde::Serialize for Source {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

impl<'de> serde::Deserialize<'de> for Source {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<str>::deserialize(deserializer)?;
        Self::new(&text).map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_come_back_and_others_are_refused() {
        assert_eq!(Source::new("leader-left").expect("a name").name(), "leader-left");
        assert_eq!(Source::literal("a name that is far too long").name().len(), MAX_SOURCE);
        for bad in ["", "two words", "ümlaut", &"x".repeat(MAX_SOURCE + 1)] {
            assert!(Source::new(bad).is_err(), "{bad}");
        }
    }
}
