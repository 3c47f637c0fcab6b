//! `tokenizer.json` and `tokenizer_config.json` from the vocabulary in a GGUF file's metadata.
//!
//! Two kinds are known: byte-level BPE (`gpt2`) and SentencePiece's BPE with a fallback to bytes (`llama`).

use super::config::{Reason, special};
use super::metadata::Metadata;
use super::pre_tokenizer::Kind;
use super::sentencepiece;
use serde::ser::{Serialize, SerializeMap, SerializeSeq, Serializer};
use serde_json::{Map, Value, json};
use std::collections::HashMap;

/// Keys that say nothing which `tokenizer.json` does not.
pub(super) const REPEATED: &[&str] = &[
    "tokenizer.ggml.merges",
    "tokenizer.ggml.scores",
    "tokenizer.ggml.token_type",
    "tokenizer.ggml.tokens",
    "tokenizer.huggingface.json",
];

// Token types.
const NORMAL: i64 = 1;
const UNKNOWN: i64 = 2;
const CONTROL: i64 = 3;
const USER_DEFINED: i64 = 4;
const UNUSED: i64 = 5;

/// A tokenizer, ready to be written.
pub(super) struct Made {
    /// `tokenizer.json`.
    pub tokenizer: Vec<u8>,
    /// What had to be assumed, if anything.
    pub note: Option<String>,
}

/// `tokenizer.json`.
pub(super) fn tokenizer(metadata: &Metadata<'_>) -> Result<Made, Reason> {
    if let Some(given) = metadata.get::<String>("tokenizer.huggingface.json")
        && serde_json::from_str::<Map<String, Value>>(&given).is_ok()
    {
        return Ok(Made { tokenizer: given.into_bytes(), note: None });
    }
    let model: String = metadata.get("tokenizer.ggml.model").ok_or("it has no tokenizer.ggml.model")?;
    let tokens: Vec<String> =
        metadata.get("tokenizer.ggml.tokens").ok_or("it has no tokenizer.ggml.tokens")?;
    let vocabulary = Vocabulary::new(metadata, &tokens)?;
    match model.as_str() {
        "gpt2" => byte_level(metadata, &vocabulary),
        "llama" => sentence_piece(metadata, &vocabulary),
        other => Err(format!("its kind {other:?} is not known; gpt2 and llama are")),
    }
}

/// `tokenizer_config.json`: special tokens, and how a chat is written as text.
pub(super) fn config(metadata: &Metadata<'_>, positions: Option<u64>) -> Value {
    let tokens: Vec<String> = metadata.get("tokenizer.ggml.tokens").unwrap_or_default();
    let mut out = Map::new();
    out.insert("clean_up_tokenization_spaces".to_owned(), json!(false));
    out.insert("tokenizer_class".to_owned(), json!("PreTrainedTokenizerFast"));
    if let Some(positions) = positions {
        out.insert("model_max_length".to_owned(), json!(positions));
    }
    for (role, name) in [("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")] {
        if let Some(token) = special(metadata, role).and_then(|id| tokens.get(id as usize)) {
            out.insert(format!("{name}_token"), json!(token));
        }
    }
    if let Some(template) = chat_template(metadata) {
        out.insert("chat_template".to_owned(), template);
    }
    Value::Object(out)
}

/// The one template, or several with their names.
fn chat_template(metadata: &Metadata<'_>) -> Option<Value> {
    const KEY: &str = "tokenizer.chat_template";
    let default = metadata.get::<String>(KEY);
    let prefix = format!("{KEY}.");
    let named: Vec<Value> = default
        .iter()
        .map(|template| ("default", template.clone()))
        .chain(metadata.keys(&prefix).filter_map(|key| Some((&key[prefix.len()..], metadata.get(key)?))))
        .map(|(name, template)| json!({ "name": name, "template": template }))
        .collect();
    match (default, named.len()) {
        (_, 0) => None,
        (Some(only), 1) => Some(Value::String(only)),
        _ => Some(Value::Array(named)),
    }
}

/// The tokens, with their types.
struct Vocabulary<'a> {
    tokens: Vec<&'a str>,
    types: Vec<i64>,
    /// The first of each; unused ones are left out.
    ids: HashMap<&'a str, u32>,
}

impl<'a> Vocabulary<'a> {
    fn new(metadata: &Metadata<'_>, tokens: &'a [String]) -> Result<Self, Reason> {
        let tokens: Vec<&str> = tokens.iter().map(String::as_str).collect();
        let types: Vec<i64> = match metadata.has("tokenizer.ggml.token_type") {
            true => metadata
                .get("tokenizer.ggml.token_type")
                .filter(|types: &Vec<i64>| types.len() == tokens.len())
                .ok_or("tokenizer.ggml.token_type does not fit tokenizer.ggml.tokens")?,
            false => vec![NORMAL; tokens.len()],
        };
        let mut ids = HashMap::with_capacity(tokens.len());
        for (id, (token, kind)) in (0u32..).zip(tokens.iter().zip(&types)) {
            if *kind != UNUSED && !token.is_empty() {
                ids.entry(*token).or_insert(id);
            }
        }
        Ok(Vocabulary { tokens, types, ids })
    }

    /// Whether the token of that number is the one that its text means.
    fn holds(&self, id: usize) -> bool {
        self.ids.get(self.tokens[id]) == Some(&(id as u32))
    }

    /// Tokens that are found in a text before anything else is.
    fn added(&self) -> Vec<Added<'a>> {
        let added = |id: usize| {
            let special = matches!(self.types[id], CONTROL | UNKNOWN);
            (special || self.types[id] == USER_DEFINED).then(|| Added {
                id,
                content: self.tokens[id],
                single_word: false,
                lstrip: false,
                rstrip: false,
                normalized: false,
                special,
            })
        };
        (0..self.tokens.len()).filter(|&id| self.holds(id)).filter_map(added).collect()
    }

    fn text(&self, id: Option<u32>) -> Option<&'a str> {
        let id = id? as usize;
        (id < self.tokens.len() && self.holds(id)).then(|| self.tokens[id])
    }

    /// The merges that the file lists; those of tokens that are not there can never happen.
    fn listed_merges(&self, listed: &[String]) -> Vec<sentencepiece::Pair> {
        let pair = |merge: &String| {
            let mut spaces = merge.char_indices().skip(1).filter(|(_, c)| *c == ' ');
            let (left, right) = merge.split_at(spaces.next()?.0);
            let right = &right[1..];
            let whole = format!("{left}{right}");
            self.ids.contains_key(whole.as_str()).then_some((*self.ids.get(left)?, *self.ids.get(right)?))
        };
        listed.iter().filter_map(pair).collect()
    }

    fn bpe(&self, merges: &[sentencepiece::Pair]) -> Bpe<'_> {
        Bpe {
            kind: "BPE",
            dropout: (),
            unk_token: None,
            continuing_subword_prefix: (),
            end_of_word_suffix: (),
            fuse_unk: false,
            byte_fallback: false,
            ignore_merges: false,
            vocab: InOrder(self),
            merges: Merges(
                merges.iter().map(|(l, r)| (self.tokens[*l as usize], self.tokens[*r as usize])).collect(),
            ),
        }
    }
}

fn byte_level(metadata: &Metadata<'_>, vocabulary: &Vocabulary<'_>) -> Result<Made, Reason> {
    let pre = metadata.get::<String>("tokenizer.ggml.pre");
    let name = pre.as_deref().unwrap_or("gpt-2");
    let kind = Kind::named(name).ok_or_else(|| format!("its way to split text, {name:?}, is not known"))?;
    let listed: Vec<String> =
        metadata.get("tokenizer.ggml.merges").ok_or("it has no tokenizer.ggml.merges")?;
    let merges = vocabulary.listed_merges(&listed);
    let add_prefix_space = metadata.get("tokenizer.ggml.add_space_prefix").unwrap_or(false);
    let bytes =
        json!({ "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true });
    let ends = Ends::new(metadata, vocabulary, kind.add_bos);
    let post_processor = match ends.json() {
        Some(template) => json!({ "type": "Sequence", "processors": [bytes, template] }),
        None => bytes.clone(),
    };
    let model = Bpe { ignore_merges: kind.ignore_merges, ..vocabulary.bpe(&merges) };
    let normalizer = if kind.composed { json!({ "type": "NFC" }) } else { Value::Null };
    let note = match pre.as_deref() {
        None | Some("default") => {
            Some("the file does not say how its tokenizer splits text; GPT-2's way is assumed".to_owned())
        }
        _ => None,
    };
    let pre_tokenizer = kind.json(add_prefix_space);
    Ok(Made { tokenizer: written(vocabulary, normalizer, pre_tokenizer, post_processor, bytes, model), note })
}

fn sentence_piece(metadata: &Metadata<'_>, vocabulary: &Vocabulary<'_>) -> Result<Made, Reason> {
    let merges = match metadata.get::<Vec<String>>("tokenizer.ggml.merges") {
        Some(listed) if !listed.is_empty() => vocabulary.listed_merges(&listed),
        _ => {
            let scores: Vec<f32> = metadata
                .get("tokenizer.ggml.scores")
                .filter(|scores: &Vec<f32>| scores.len() == vocabulary.tokens.len())
                .ok_or("tokenizer.ggml.scores does not fit tokenizer.ggml.tokens")?;
            // Only ordinary tokens are made of others.
            let ordinary = |id: usize| vocabulary.types[id] == NORMAL && vocabulary.holds(id);
            let pieces: Vec<&str> = (0..vocabulary.tokens.len())
                .map(|id| if ordinary(id) { vocabulary.tokens[id] } else { "" })
                .collect();
            let ids = vocabulary.ids.iter().filter(|(_, id)| ordinary(**id as usize));
            let ids: HashMap<&str, u32> = ids.map(|(token, id)| (*token, *id)).collect();
            sentencepiece::merges(&pieces, &scores, &ids)?
        }
    };
    let prefix = metadata.get("tokenizer.ggml.add_space_prefix").unwrap_or(true);
    let spaces = json!({ "type": "Replace", "pattern": { "String": " " }, "content": "▁" });
    let normalizer = if prefix {
        json!({ "type": "Sequence", "normalizers": [{ "type": "Prepend", "prepend": "▁" }, spaces] })
    } else {
        spaces
    };
    let mut decoders = vec![
        json!({ "type": "Replace", "pattern": { "String": "▁" }, "content": " " }),
        json!({ "type": "ByteFallback" }),
        json!({ "type": "Fuse" }),
    ];
    if prefix {
        decoders.push(json!({ "type": "Strip", "content": " ", "start": 1, "stop": 0 }));
    }
    let unknown = vocabulary.types.iter().position(|kind| *kind == UNKNOWN).map(|id| id as u32);
    let model = Bpe {
        unk_token: vocabulary.text(special(metadata, "unknown").or(unknown)),
        fuse_unk: true,
        byte_fallback: true,
        ..vocabulary.bpe(&merges)
    };
    let post_processor = Ends::new(metadata, vocabulary, true).json().unwrap_or(Value::Null);
    let decoder = json!({ "type": "Sequence", "decoders": decoders });
    let tokenizer = written(vocabulary, normalizer, Value::Null, post_processor, decoder, model);
    Ok(Made { tokenizer, note: None })
}

/// The tokens that are put around a text.
struct Ends<'a> {
    first: Option<(&'a str, u32)>,
    last: Option<(&'a str, u32)>,
}

impl<'a> Ends<'a> {
    fn new(metadata: &Metadata<'_>, vocabulary: &Vocabulary<'a>, add_bos: bool) -> Self {
        let end = |role: &str, default: bool| {
            let id = special(metadata, role)?;
            let wanted = metadata.get(&format!("tokenizer.ggml.add_{role}_token")).unwrap_or(default);
            wanted.then_some((vocabulary.text(Some(id))?, id))
        };
        Ends { first: end("bos", add_bos), last: end("eos", false) }
    }

    fn json(&self) -> Option<Value> {
        let ends: Vec<(&str, u32)> = [self.first, self.last].into_iter().flatten().collect();
        if ends.is_empty() {
            return None;
        }
        let around = |sequence: &str, kind: u32| {
            let token = |end: Option<(&str, u32)>| {
                end.map(|(text, _)| json!({ "SpecialToken": { "id": text, "type_id": kind } }))
            };
            let text = json!({ "Sequence": { "id": sequence, "type_id": kind } });
            token(self.first).into_iter().chain([text]).chain(token(self.last)).collect::<Vec<_>>()
        };
        let tokens: Map<String, Value> = ends
            .iter()
            .map(|(text, id)| ((*text).to_owned(), json!({ "id": text, "ids": [id], "tokens": [text] })))
            .collect();
        let pair = [around("A", 0), around("B", 1)].concat();
        Some(json!({
            "type": "TemplateProcessing",
            "single": around("A", 0),
            "pair": pair,
            "special_tokens": tokens,
        }))
    }
}

/// The file as it is written; the order of its fields is that of the library tokenizers.
#[derive(serde::Serialize)]
struct Written<'a> {
    version: &'static str,
    truncation: (),
    padding: (),
    added_tokens: Vec<Added<'a>>,
    normalizer: Value,
    pre_tokenizer: Value,
    post_processor: Value,
    decoder: Value,
    model: Bpe<'a>,
}

/// The file's bytes.
fn written<'a>(
    vocabulary: &'a Vocabulary<'a>,
    normalizer: Value,
    pre_tokenizer: Value,
    post_processor: Value,
    decoder: Value,
    model: Bpe<'a>,
) -> Vec<u8> {
    let file = Written {
        version: "1.0",
        truncation: (),
        padding: (),
        added_tokens: vocabulary.added(),
        normalizer,
        pre_tokenizer,
        post_processor,
        decoder,
        model,
    };
    serde_json::to_vec(&file).expect("strings and numbers are always JSON, and memory takes it")
}

#[derive(serde::Serialize)]
struct Added<'a> {
    id: usize,
    content: &'a str,
    single_word: bool,
    lstrip: bool,
    rstrip: bool,
    normalized: bool,
    special: bool,
}

#[derive(serde::Serialize)]
struct Bpe<'a> {
    #[serde(rename = "type")]
    kind: &'static str,
    dropout: (),
    unk_token: Option<&'a str>,
    continuing_subword_prefix: (),
    end_of_word_suffix: (),
    fuse_unk: bool,
    byte_fallback: bool,
    ignore_merges: bool,
    vocab: InOrder<'a>,
    merges: Merges<'a>,
}

/// The vocabulary by number.
struct InOrder<'a>(&'a Vocabulary<'a>);

impl Serialize for InOrder<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.ids.len()))?;
        for id in (0..self.0.tokens.len()).filter(|&id| self.0.holds(id)) {
            map.serialize_entry(self.0.tokens[id], &id)?;
        }
        map.end()
    }
}

/// Pairs and not strings, so that a space may stand in a token.
struct Merges<'a>(Vec<(&'a str, &'a str)>);

impl Serialize for Merges<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut list = serializer.serialize_seq(Some(self.0.len()))?;
        for pair in &self.0 {
            list.serialize_element(pair)?;
        }
        list.end()
    }
}
