//! Instructions to token ids.

use std::path::{Path, PathBuf};

use tokenizers::{Tokenizer, TruncationParams};

use crate::ModelError;

/// Tokenizes instructions, remembering the last one.
///
/// Padding is left out: no valid token ever sees it.
pub struct Prompter {
    tokenizer: Tokenizer,
    path: PathBuf,
    append_newline: bool,
    last: Option<(String, Vec<u32>)>,
}

impl Prompter {
    /// The tokenizer in `json` (the text of a `tokenizer.json`); `path` is for messages.
    ///
    /// # Errors
    /// [`ModelError::Tokenizer`] when it cannot be read.
    pub fn new(
        path: &Path,
        json: &[u8],
        max_length: usize,
        append_newline: bool,
    ) -> Result<Self, ModelError> {
        let fail = |reason: String| ModelError::Tokenizer { path: path.to_owned(), reason };
        let mut tokenizer = Tokenizer::from_bytes(json)
            .map_err(|e| fail(format!("is no tokenizer.json that can be read: {e}")))?;
        tokenizer.with_padding(None);
        tokenizer
            .with_truncation(Some(TruncationParams { max_length, ..TruncationParams::default() }))
            .map_err(|e| fail(format!("cannot cut texts to {max_length} tokens: {e}")))?;
        Ok(Self { tokenizer, path: path.to_owned(), append_newline, last: None })
    }

    /// Token ids of `instruction`, at most the configured length. The last instruction's are kept.
    ///
    /// # Errors
    /// [`ModelError::Tokenizer`] when the text cannot be encoded.
    pub fn encode(&mut self, instruction: &str) -> Result<&[u32], ModelError> {
        if self.last.as_ref().is_none_or(|(text, _)| text != instruction) {
            let ids = self.tokenize(instruction)?;
            self.last = Some((instruction.to_owned(), ids));
        }
        Ok(self.last.as_ref().map_or(&[], |(_, ids)| ids.as_slice()))
    }

    fn tokenize(&self, instruction: &str) -> Result<Vec<u32>, ModelError> {
        let mut text = instruction.to_owned();
        if self.append_newline && !text.ends_with('\n') {
            text.push('\n');
        }
        self.ids(text, true)
    }

    /// Id of the special token `name`.
    ///
    /// # Errors
    /// [`ModelError::Tokenizer`] when the tokenizer has no such token.
    pub fn special(&self, name: &str) -> Result<u32, ModelError> {
        self.tokenizer.token_to_id(name).ok_or_else(|| ModelError::Tokenizer {
            path: self.path.clone(),
            reason: format!("has no token `{name}`; use the tokenizer of the checkpoint's VLM"),
        })
    }

    /// Token ids of `text` alone, without the marks around a prompt.
    ///
    /// # Errors
    /// [`ModelError::Tokenizer`] when the text cannot be encoded.
    pub fn encode_plain(&self, text: &str) -> Result<Vec<u32>, ModelError> {
        self.ids(text.to_owned(), false)
    }

    fn ids(&self, text: String, marks: bool) -> Result<Vec<u32>, ModelError> {
        let encoding = self.tokenizer.encode(text, marks).map_err(|e| ModelError::Tokenizer {
            path: self.path.clone(),
            reason: format!("cannot encode the instruction: {e}"),
        })?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Number of tokens in the learned vocabulary, without those that were added to it later.
    pub fn learned_tokens(&self) -> usize {
        self.tokenizer.get_vocab_size(false)
    }

    /// Number of tokens that it knows.
    pub fn vocabulary(&self) -> usize {
        self.tokenizer.get_vocab_size(true)
    }
}
