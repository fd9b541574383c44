//! A small byte-level BPE tokenizer of the kind SmolVLM2 has: every text can be written with it, and the
//! words of common instructions are one token each.

use std::collections::BTreeSet;

use serde_json::{Map, Value, json};

use crate::heads::fast::byte_character;

const SPECIAL_FIRST: [&str; 3] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];
const SPECIAL_LAST: [&str; 3] = ["<fake_token_around_image>", "<image>", "<global-img>"];
const WORDS: &str = "a and arm bin block blue bottle bowl box button close cube cup door drawer from \
    gripper handle in into it left lift move of on open pick place plate pour press push put red \
    right stack table the then to towel up water white with yellow";

/// A tokenizer and the number of its tokens.
pub struct Vocabulary {
    pub json: Value,
    pub size: usize,
}

fn mark(id: usize, content: &str) -> Value {
    json!({ "id": id, "content": content, "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false, "special": true })
}

impl Vocabulary {
    /// The same with a token `begin`, which no text has.
    pub fn with_begin(mut self, begin: &str) -> Self {
        if let Some(added) = self.json["added_tokens"].as_array_mut() {
            added.push(mark(self.size, begin));
            self.size += 1;
        }
        self
    }
}

/// A tokenizer with one token for each byte.
pub fn bytes() -> Value {
    let vocab: Map<String, Value> =
        (0..=255).map(|byte| (byte_character(byte).to_string(), json!(byte))).collect();
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
        "normalizer": null, "pre_tokenizer": null, "post_processor": null, "decoder": null,
        "model": { "type": "BPE", "dropout": null, "unk_token": null,
            "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": false,
            "byte_fallback": false, "ignore_merges": false, "vocab": vocab, "merges": [] }
    })
}

/// Builds the tokenizer.
pub fn byte_level() -> Vocabulary {
    let mut tokens: Vec<String> = SPECIAL_FIRST.iter().map(|t| (*t).to_owned()).collect();
    let mut alphabet: Vec<char> = (0..=255).map(byte_character).collect();
    alphabet.sort_unstable();
    tokens.extend(alphabet.iter().map(char::to_string));
    let mut seen: BTreeSet<String> = tokens.iter().cloned().collect();
    let mut merges = Vec::new();
    for word in WORDS.split_whitespace() {
        // Words come with the space before them, which is written Ġ.
        let letters: Vec<char> = format!("{}{word}", byte_character(b' ')).chars().collect();
        let mut whole = letters[0].to_string();
        for letter in &letters[1..] {
            let longer = format!("{whole}{letter}");
            if seen.insert(longer.clone()) {
                merges.push(json!([whole, letter.to_string()]));
                tokens.push(longer.clone());
            }
            whole = longer;
        }
    }
    tokens.extend(SPECIAL_LAST.iter().map(|t| (*t).to_owned()));
    let size = tokens.len();
    let added: Vec<Value> = tokens
        .iter()
        .enumerate()
        .filter(|(_, t)| SPECIAL_FIRST.contains(&t.as_str()) || SPECIAL_LAST.contains(&t.as_str()))
        .map(|(id, content)| mark(id, content))
        .collect();
    let learned = tokens.iter().enumerate().take(size - SPECIAL_LAST.len());
    let vocab: Map<String, Value> = learned.map(|(id, t)| (t.clone(), json!(id))).collect();
    let byte_level = |space: bool| json!({ "type": "ByteLevel", "add_prefix_space": space, "trim_offsets": true, "use_regex": true });
    let json = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
        "normalizer": null,
        "pre_tokenizer": { "type": "Sequence", "pretokenizers":
            [{ "type": "Digits", "individual_digits": true }, byte_level(false)] },
        "post_processor": null,
        "decoder": byte_level(true),
        "model": { "type": "BPE", "dropout": null, "unk_token": null,
            "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": false,
            "byte_fallback": false, "ignore_merges": false, "vocab": vocab, "merges": merges }
    });
    Vocabulary { json, size }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::processors::Prompter;

    #[test]
    fn common_words_are_one_token_and_every_text_has_tokens() {
        let vocabulary = byte_level();
        let json = vocabulary.json.to_string();
        let mut prompter =
            Prompter::new("t".as_ref(), json.as_bytes(), 64, true).expect("our own tokenizer");
        assert_eq!(prompter.vocabulary(), vocabulary.size);
        let ids = prompter.encode("pick up the red cube").expect("bytes cover it").to_vec();
        assert_eq!(ids.len(), "pick".len() + 4 + 1, "{ids:?}");
        assert!(prompter.encode("naïve 🤖 42").is_ok_and(|ids| ids.len() > 10));
    }
}
