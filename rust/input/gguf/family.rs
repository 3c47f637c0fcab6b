//! The architectures that are translated: what their tensors are called in Hugging Face models, and how each lies.

use super::order::Order;

/// How a kind of tensor is arranged; for heads, their size is in the metadata.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Lies {
    Same,
    Heads,
    Conv1d,
}

/// An architecture, in both worlds' words.
pub(super) struct Family {
    /// `general.architecture`.
    pub architecture: &'static str,
    /// `model_type` in `config.json`.
    pub model_type: &'static str,
    /// The class in transformers.
    pub class: &'static str,
    /// Modules at the top.
    top: &'static [(&'static str, &'static str)],
    /// What stands before a layer's number.
    layers: &'static str,
    /// Modules of a layer.
    modules: &'static [(&'static str, &'static str, Lies)],
    /// Whether queries and keys are interleaved for the rotation.
    interleaved: bool,
}

const LLAMA_TOP: &[(&str, &str)] =
    &[("token_embd", "model.embed_tokens"), ("output_norm", "model.norm"), ("output", "lm_head")];

const QWEN3: &[(&str, &str, Lies)] = &[
    ("attn_norm", "input_layernorm", Lies::Same),
    ("attn_q", "self_attn.q_proj", Lies::Heads),
    ("attn_k", "self_attn.k_proj", Lies::Heads),
    ("attn_v", "self_attn.v_proj", Lies::Same),
    ("attn_output", "self_attn.o_proj", Lies::Same),
    ("ffn_norm", "post_attention_layernorm", Lies::Same),
    ("ffn_gate", "mlp.gate_proj", Lies::Same),
    ("ffn_up", "mlp.up_proj", Lies::Same),
    ("ffn_down", "mlp.down_proj", Lies::Same),
    ("attn_q_norm", "self_attn.q_norm", Lies::Same),
    ("attn_k_norm", "self_attn.k_norm", Lies::Same),
];

/// The same without norms of queries and keys.
const LLAMA: &[(&str, &str, Lies)] = QWEN3.split_at(9).0;

const GPT2: &[(&str, &str, Lies)] = &[
    ("attn_norm", "ln_1", Lies::Same),
    ("attn_qkv", "attn.c_attn", Lies::Conv1d),
    ("attn_output", "attn.c_proj", Lies::Conv1d),
    ("ffn_norm", "ln_2", Lies::Same),
    ("ffn_up", "mlp.c_fc", Lies::Conv1d),
    ("ffn_down", "mlp.c_proj", Lies::Conv1d),
];

/// Every architecture that is translated; Mistral's is llama.
pub(super) const ALL: &[Family] = &[
    Family {
        architecture: "llama",
        model_type: "llama",
        class: "LlamaForCausalLM",
        top: LLAMA_TOP,
        layers: "model.layers",
        modules: LLAMA,
        interleaved: true,
    },
    Family {
        architecture: "qwen2",
        model_type: "qwen2",
        class: "Qwen2ForCausalLM",
        top: LLAMA_TOP,
        layers: "model.layers",
        modules: LLAMA,
        interleaved: false,
    },
    Family {
        architecture: "qwen3",
        model_type: "qwen3",
        class: "Qwen3ForCausalLM",
        top: LLAMA_TOP,
        layers: "model.layers",
        modules: QWEN3,
        interleaved: false,
    },
    Family {
        architecture: "gpt2",
        model_type: "gpt2",
        class: "GPT2LMHeadModel",
        top: &[
            ("token_embd", "transformer.wte"),
            ("position_embd", "transformer.wpe"),
            ("output_norm", "transformer.ln_f"),
            ("output", "lm_head"),
        ],
        layers: "transformer.h",
        modules: GPT2,
        interleaved: false,
    },
];

impl Family {
    /// A tensor's Hugging Face name and its arrangement, if it is one of this family with so many layers.
    pub fn translate(&self, name: &str, layers: usize, head_dim: usize) -> Option<(String, Order)> {
        let (module, part) = name.rsplit_once('.').filter(|(_, part)| matches!(*part, "weight" | "bias"))?;
        let Some(rest) = module.strip_prefix("blk.") else {
            let (_, theirs) = self.top.iter().find(|(ours, _)| *ours == module)?;
            return Some((format!("{theirs}.{part}"), Order::Same));
        };
        let (number, module) = rest.split_once('.')?;
        let index: usize = number.parse().ok()?;
        // Only the canonical spelling, so that no two names become one.
        if index >= layers || number != index.to_string() {
            return None;
        }
        let (_, theirs, lies) = self.modules.iter().find(|(ours, _, _)| *ours == module)?;
        let order = match lies {
            Lies::Heads if self.interleaved => Order::Interleaved(head_dim),
            Lies::Conv1d if part == "weight" => Order::Transposed,
            _ => Order::Same,
        };
        Some((format!("{}.{index}.{theirs}.{part}", self.layers), order))
    }
}
