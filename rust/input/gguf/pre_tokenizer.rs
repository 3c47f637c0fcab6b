//! How text is split before byte-level BPE: llama.cpp's names (`tokenizer.ggml.pre`) for what a `tokenizer.json` spells out.

use serde_json::{Value, json};

/// One kind of splitting.
pub(super) struct Kind {
    /// llama.cpp's names for it.
    names: &'static [&'static str],
    /// Steps before the bytes.
    steps: &'static [Step],
    /// Whether GPT-2's own pattern then splits what is left.
    gpt2: bool,
    /// Whether text is composed (NFC) first.
    pub composed: bool,
    /// Whether a piece that is a token is taken whole, whatever the merges say.
    pub ignore_merges: bool,
    /// Whether a text begins with a token of its own, where the file does not say.
    pub add_bos: bool,
}

/// A step: what matches becomes a piece of its own.
enum Step {
    Pattern(&'static str),
    Digit,
}

const PLAIN: Kind =
    Kind { names: &[], steps: &[], gpt2: true, composed: false, ignore_merges: false, add_bos: false };

const LLAMA3: &[Step] = &[Step::Pattern(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)];

const QWEN2: &[Step] = &[Step::Pattern(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)];

const TEKKEN: &[Step] = &[Step::Pattern(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)];

const DEEPSEEK_CODER: &[Step] = &[
    Step::Pattern(r"[\r\n]"),
    Step::Pattern(r"\s?\p{L}+"),
    Step::Pattern(r"\s?\p{P}+"),
    Step::Pattern("[一-龥ࠀ-一가-퟿]+"),
    Step::Digit,
];

const KINDS: &[Kind] = &[
    Kind {
        names: &[
            "default",
            "gpt-2",
            "gpt2",
            "phi-2",
            "mpt",
            "olmo",
            "jais",
            "exaone4",
            "trillion",
            "granite-docling",
        ],
        ..PLAIN
    },
    Kind {
        names: &["smollm", "starcoder", "refact", "codeshell", "exaone", "minerva-7b"],
        steps: &[Step::Digit],
        ..PLAIN
    },
    Kind { names: &["command-r"], steps: &[Step::Digit], composed: true, ..PLAIN },
    Kind {
        names: &["llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral"],
        steps: LLAMA3,
        gpt2: false,
        ignore_merges: true,
        add_bos: true,
        ..PLAIN
    },
    Kind { names: &["smaug-bpe", "dbrx"], steps: LLAMA3, gpt2: false, ..PLAIN },
    Kind { names: &["tekken"], steps: TEKKEN, gpt2: false, ignore_merges: true, add_bos: true, ..PLAIN },
    Kind {
        names: &["qwen2", "stablelm2", "deepseek-r1-qwen", "megrez", "hunyuan"],
        steps: QWEN2,
        gpt2: false,
        composed: true,
        ..PLAIN
    },
    Kind { names: &["deepseek-coder"], steps: DEEPSEEK_CODER, gpt2: false, ..PLAIN },
];

impl Kind {
    /// The kind that llama.cpp calls so.
    pub fn named(name: &str) -> Option<&'static Kind> {
        KINDS.iter().find(|kind| kind.names.contains(&name))
    }

    /// As `tokenizer.json` has it.
    pub fn json(&self, add_prefix_space: bool) -> Value {
        let bytes = json!({
            "type": "ByteLevel",
            "add_prefix_space": add_prefix_space,
            "trim_offsets": true,
            "use_regex": self.gpt2,
        });
        if self.steps.is_empty() {
            return bytes;
        }
        let steps = self.steps.iter().map(|step| match step {
            Step::Pattern(pattern) => json!({
                "type": "Split",
                "pattern": { "Regex": pattern },
                "behavior": "Isolated",
                "invert": false,
            }),
            Step::Digit => json!({ "type": "Digits", "individual_digits": true }),
        });
        let pretokenizers: Vec<Value> = steps.chain([bytes]).collect();
        json!({ "type": "Sequence", "pretokenizers": pretokenizers })
    }
}
