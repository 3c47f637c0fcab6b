//! GGUF: block formats to the last bit, malformed files refused with the place, known architectures translated.

mod support;

use half::{bf16, f16};
use support::gguf::{GgufFile, gguf, string};
use support::models::{refused, widened};
use tenpak::Kind;
use tenpak::input::{Gguf, Model};
use tenpak::tensor::{Blocks, Dtype, Encoding};

#[test]
fn gguf_tensors_hold_what_the_block_formulas_say() {
    let d = f16::from_f32(0.75).to_le_bytes();
    let m = f16::from_f32(-2.5).to_le_bytes();
    let q = |i: usize| (i * 29 % 256) as u8;
    let mut q8 = Vec::new();
    let mut q40 = Vec::new();
    let mut q41 = Vec::new();
    for block in 0..4 {
        q8.extend(d.into_iter().chain((0..32).map(|i| q(block * 32 + i))));
        q40.extend(d.into_iter().chain((0..16).map(|i| q(block * 16 + i))));
        q41.extend(d.into_iter().chain(m).chain((0..16).map(|i| q(block * 16 + i))));
    }
    let floats = |n: usize| (0..n).map(|i| i as f32 * 0.5 - 3.0);
    let f32s: Vec<u8> = floats(6).flat_map(f32::to_le_bytes).collect();
    let f16s: Vec<u8> = floats(6).flat_map(|x| f16::from_f32(x).to_le_bytes()).collect();
    let bf16s: Vec<u8> = floats(6).flat_map(|x| bf16::from_f32(x).to_le_bytes()).collect();
    for version in [2, 3] {
        let mut file = gguf()
            .pair("general.architecture", 8, &string("llama \u{1}\"ü"))
            .pair(
                "a.list",
                9,
                &[&8u32.to_le_bytes()[..], &2u64.to_le_bytes(), &string("x"), &string("y")].concat(),
            )
            .pair("a.f", 6, &0.1f32.to_le_bytes())
            .pair("a.nan", 12, &f64::NAN.to_le_bytes())
            .pair("a.flags", 9, &[&7u32.to_le_bytes()[..], &2u64.to_le_bytes(), &[1, 0]].concat())
            .pair("a.i", 11, &(-5i64).to_le_bytes())
            .pair("a.u", 10, &u64::MAX.to_le_bytes())
            .pair("general.alignment", 4, &64u32.to_le_bytes());
        file.alignment = 64;
        file.version = version;
        let file = file
            .tensor("f32", &[3, 2], 0, &f32s)
            .tensor("f16", &[3, 2], 1, &f16s)
            .tensor("bf16", &[3, 2], 30, &bf16s)
            .tensor("q8", &[64, 2], 8, &q8)
            .tensor("q40", &[32, 2, 2], 2, &q40)
            .tensor("q41", &[128], 3, &q41)
            .tensor("none", &[32, 0], 2, &[])
            .tensor("i8", &[3], 24, &[1, 2, 255])
            .tensor("i64", &[1], 27, &7u64.to_le_bytes());
        let model = Gguf::from_bytes("m.gguf", file.bytes()).unwrap();
        let shapes: Vec<&[usize]> = model.tensors().iter().map(|t| &t.shape[..]).collect();
        assert_eq!(shapes[..7], [&[2, 3][..], &[2, 3], &[2, 3], &[2, 64], &[2, 2, 32], &[128], &[0, 32]]);
        for i in 0..3 {
            assert_eq!(widened(&model, i), floats(6).collect::<Vec<_>>());
        }
        let nibble = |i: usize| {
            let byte = q(i / 32 * 16 + i % 16);
            f32::from(if i % 32 < 16 { byte & 15 } else { byte >> 4 })
        };
        let expect = |f: &dyn Fn(usize) -> f32| (0..128).map(f).collect::<Vec<_>>();
        assert_eq!(widened(&model, 3), expect(&|i| 0.75 * f32::from(q(i).cast_signed())));
        assert_eq!(widened(&model, 4), expect(&|i| 0.75 * (nibble(i) - 8.0)));
        assert_eq!(widened(&model, 5), expect(&|i| 0.75 * nibble(i) - 2.5));
        assert_eq!(model.tensors()[7].encoding, Encoding::Plain(Dtype::I8));
        assert_eq!(*model.read(7).unwrap().bytes, [1, 2, 255]);
        let [sidecar] = &model.sidecars().unwrap()[..] else { panic!("one sidecar") };
        assert_eq!(sidecar.path, "gguf_metadata.json");
        assert_eq!(
            String::from_utf8_lossy(&sidecar.bytes),
            "{\"a.f\":0.1,\"a.flags\":[true,false],\"a.i\":-5,\"a.list\":[\"x\",\"y\"],\"a.nan\":null,\
             \"a.u\":18446744073709551615,\"general.alignment\":64,\
             \"general.architecture\":\"llama \\u0001\\\"ü\"}"
        );
    }
}

#[test]
fn malformed_gguf_are_refused_with_the_place() {
    let f32_at = |offset| gguf().describe("w", &[8], 0, offset).data(32);
    let counts = |tensors, pairs| GgufFile { counts: Some((tensors, pairs)), ..f32_at(0) };
    let version = |version| GgufFile { version, ..gguf() };
    let list = |item: u32, count: u64| {
        gguf().pair("k", 9, &[&item.to_le_bytes()[..], &count.to_le_bytes()].concat())
    };
    let long = "n".repeat(1025);
    let cases: Vec<(GgufFile, Kind, &[&str])> = vec![
        (version(1), Kind::Unsupported, &["version 1"]),
        (version(4), Kind::Unsupported, &["version 4"]),
        (version(3u32.swap_bytes()), Kind::Unsupported, &["big-endian"]),
        (counts(u64::MAX, 0), Kind::Input, &["byte 16", "18446744073709551615 tensors"]),
        (counts(2, 0), Kind::Input, &["\"w\"", "beyond the 0 bytes"]),
        (counts(1, u64::MAX), Kind::Input, &["byte 24", "18446744073709551615 key-value pairs"]),
        (counts(1, 1), Kind::Input, &["name", "empty"]),
        (gguf().pair("k", 13, &[0; 8]), Kind::Unsupported, &["\"k\"", "unknown type 13"]),
        (gguf().pair("k", 7, &[2]), Kind::Input, &["\"k\"", "boolean of value 2"]),
        (gguf().pair("k", 4, &[0; 4]).pair("k", 4, &[0; 4]), Kind::Input, &["\"k\" stands twice"]),
        (gguf().pair("k", 8, &u64::MAX.to_le_bytes()), Kind::Input, &["\"k\"", "18446744073709551615 bytes"]),
        (list(4, u64::MAX), Kind::Input, &["\"k\"", "18446744073709551615 items"]),
        (list(8, 1 << 40), Kind::Input, &["\"k\"", "1099511627776 items"]),
        (list(9, 1), Kind::Unsupported, &["\"k\"", "array of arrays"]),
        (list(99, 1), Kind::Unsupported, &["\"k\"", "unknown type 99"]),
        (gguf().pair("general.alignment", 4, &48u32.to_le_bytes()), Kind::Input, &["general.alignment"]),
        (gguf().pair("general.alignment", 4, &0u32.to_le_bytes()), Kind::Input, &["general.alignment"]),
        (gguf().pair("general.alignment", 8, &string("x")), Kind::Input, &["general.alignment"]),
        (gguf().pair("split.count", 2, &3u16.to_le_bytes()), Kind::Unsupported, &["one of 3 parts"]),
        (gguf().describe("w", &[1, 1, 1, 1, 1], 0, 0), Kind::Input, &["\"w\"", "5 dimensions"]),
        (gguf().describe("w", &[256], 29, 0).data(144), Kind::Unsupported, &["\"w\"", "IQ1_M (29)", "Q8_0"]),
        (gguf().describe("w", &[256], 4, 0).data(144), Kind::Unsupported, &["\"w\"", "unknown (4)"]),
        (gguf().describe("w", &[33], 8, 0).data(64), Kind::Input, &["\"w\"", "rows of 33", "Q8_0"]),
        (gguf().describe("w", &[16, 2], 2, 0).data(64), Kind::Input, &["\"w\"", "rows of 16"]),
        (gguf().describe("w", &[u64::MAX, 2], 0, 0).data(64), Kind::Input, &["\"w\"", "2^56"]),
        (gguf().describe("w", &[1 << 40], 0, 0).data(64), Kind::Input, &["\"w\"", "beyond the 64 bytes"]),
        (f32_at(16), Kind::Input, &["\"w\"", "offset 16", "alignment, 32"]),
        (f32_at(32), Kind::Input, &["\"w\"", "offset 32", "beyond"]),
        (f32_at(u64::MAX - 31), Kind::Input, &["\"w\"", "beyond"]),
        (f32_at(0).describe("w", &[8], 0, 32).data(64), Kind::Input, &["\"w\" stands twice"]),
        (
            gguf().describe("a", &[16], 0, 0).describe("b", &[8], 0, 32).data(96),
            Kind::Input,
            &["\"b\"", "overlap", "\"a\""],
        ),
        (gguf().describe("", &[8], 0, 0).data(32), Kind::Input, &["name", "empty"]),
        (gguf().describe(&long, &[8], 0, 0).data(32), Kind::Input, &["1025 bytes"]),
        (gguf().describe("a\u{7}", &[8], 0, 0).data(32), Kind::Input, &["control character"]),
    ];
    for (i, (file, kind, words)) in cases.into_iter().enumerate() {
        let bytes = file.bytes();
        refused(
            Gguf::from_bytes("m.gguf", bytes),
            kind,
            &[&["m.gguf"], words].concat(),
            &format!("case {i}: {words:?}"),
        );
    }
    refused(Gguf::from_bytes("m", b"GGUX".to_vec()), Kind::Input, &["GGUF"], "magic");
    let name = [&1u64.to_le_bytes()[..], &[0xff], &0u32.to_le_bytes(), &[0; 12]].concat();
    let mut not_text = gguf();
    not_text.tensors.push(name);
    refused(Gguf::from_bytes("m", not_text.bytes()), Kind::Input, &["byte 24", "not UTF-8"], "name");
}

#[test]
fn every_truncation_of_a_gguf_file_is_refused() {
    let whole = gguf()
        .pair("k", 9, &[&8u32.to_le_bytes()[..], &1u64.to_le_bytes(), &string("x")].concat())
        .tensor("a", &[32], 8, &[7; 34])
        .tensor("b", &[2], 0, &[7; 8])
        .bytes();
    Gguf::from_bytes("m", whole.clone()).unwrap();
    for len in 0..whole.len() {
        refused(Gguf::from_bytes("m", whole[..len].to_vec()), Kind::Input, &["m: "], &format!("{len} bytes"));
    }
}

/// BLAKE3 of 2048 weights that libgguf 0.2.2, ggml's own code, makes of [`block_bytes`].
const GOLDEN: &[(Blocks, &[usize], &str)] = &[
    (Blocks::Q4_0, &[0], "b6ef7afc41382e5b"),
    (Blocks::Q4_1, &[0, 2], "059c4e48eec76a5c"),
    (Blocks::Q5_0, &[0], "a70f420c8b96771f"),
    (Blocks::Q5_1, &[0, 2], "7a3f468385164796"),
    (Blocks::Q8_0, &[0], "1fca3232692cc9a9"),
    (Blocks::Q2_K, &[80, 82], "62e4959e033646dc"),
    (Blocks::Q3_K, &[108], "b03f3a4e645eaaa4"),
    (Blocks::Q4_K, &[0, 2], "f8059bf5cf91d887"),
    (Blocks::Q5_K, &[0, 2], "794566ec8c8b5290"),
    (Blocks::Q6_K, &[208], "3544472f88418149"),
    (Blocks::IQ4_NL, &[0], "076fe0d41c56f3c4"),
    (Blocks::IQ4_XS, &[0], "7dad8b5f73ff6d34"),
];

/// Arbitrary codes, with FP16 numbers between 1/16 and 1/8 at `halves` of each block.
fn block_bytes(format: Blocks, halves: &[usize]) -> Vec<u8> {
    let len = (2048 / format.weights() * format.bytes()) as u64;
    let mut bytes: Vec<u8> = (0..len).map(|i| ((i * i * 31 + i * 7 + (i >> 5) * 13) % 251) as u8).collect();
    for (number, block) in bytes.chunks_exact_mut(format.bytes()).enumerate() {
        for &at in halves {
            let value = 0x2c00 + ((number * 37 + at * 11) % 1024) as u16;
            block[at..at + 2].copy_from_slice(&value.to_le_bytes());
        }
    }
    bytes
}

#[test]
fn every_block_format_gives_ggmls_weights_bit_for_bit() {
    assert_eq!(GOLDEN.len(), Blocks::ALL.len());
    for &(format, halves, golden) in GOLDEN {
        let bytes = block_bytes(format, halves);
        let file = gguf().tensor("w", &[512, 4], format.id(), &bytes);
        let model = Gguf::from_bytes("m", file.bytes()).unwrap();
        assert_eq!(model.tensors()[0].encoding, Encoding::Blocks(format));
        let weights = widened(&model, 0);
        let spelled: Vec<u8> = weights.iter().flat_map(|w| w.to_le_bytes()).collect();
        assert_eq!(&blake3::hash(&spelled).to_hex()[..16], golden, "{}", format.name());
        for start in [1, 31, 32, 255, 256, 300, 2047] {
            let mut part = vec![0.0; 2048 - start];
            Encoding::Blocks(format).widen(&bytes, start, &mut part);
            assert_eq!(part, weights[start..], "{} from {start}", format.name());
        }
    }
}

fn number(value: u32) -> [u8; 4] {
    value.to_le_bytes()
}

/// A Llama of one layer, eight wide, with two heads of four and one head of keys; tensor `i` counts up from 1000 i.
fn llama() -> GgufFile {
    let file = gguf()
        .pair("general.architecture", 8, &string("llama"))
        .pair("llama.block_count", 4, &number(1))
        .pair("llama.embedding_length", 4, &number(8))
        .pair("llama.feed_forward_length", 4, &number(12))
        .pair("llama.attention.head_count", 4, &number(2))
        .pair("llama.attention.head_count_kv", 4, &number(1))
        .pair("llama.context_length", 4, &number(64))
        .pair("llama.attention.layer_norm_rms_epsilon", 6, &1e-5f32.to_le_bytes());
    let tensors: &[(&str, &[u64])] = &[
        ("token_embd.weight", &[8, 5]),
        ("blk.0.attn_norm.weight", &[8]),
        ("blk.0.attn_q.weight", &[8, 8]),
        ("blk.0.attn_k.weight", &[8, 4]),
        ("blk.0.attn_v.weight", &[8, 4]),
        ("blk.0.attn_output.weight", &[8, 8]),
        ("blk.0.ffn_norm.weight", &[8]),
        ("blk.0.ffn_gate.weight", &[8, 12]),
        ("blk.0.ffn_up.weight", &[8, 12]),
        ("blk.0.ffn_down.weight", &[12, 8]),
        ("output_norm.weight", &[8]),
    ];
    tensors.iter().enumerate().fold(file, |file, (i, (name, dims))| {
        let bytes: Vec<u8> = (0..dims.iter().product::<u64>())
            .flat_map(|j| (1000.0 * i as f32 + j as f32).to_le_bytes())
            .collect();
        file.tensor(name, dims, 0, &bytes)
    })
}

fn open(file: &GgufFile) -> Gguf {
    Gguf::from_bytes("m.gguf", file.bytes()).unwrap()
}

#[test]
fn a_llama_appears_as_in_a_hugging_face_folder() {
    let model = open(&llama());
    let names: Vec<&str> = model.tensors().iter().map(|t| t.name.as_str()).collect();
    assert_eq!(names[0], "model.embed_tokens.weight");
    assert_eq!(names[2], "model.layers.0.self_attn.q_proj.weight");
    assert_eq!(names[9], "model.layers.0.mlp.down_proj.weight");
    assert_eq!(model.tensors()[7].shape, [12, 8]);
    // Rows of both heads come as 0, 2, 1, 3; those of the keys too, and those of the values not.
    let firsts = |index: usize| widened(&model, index).into_iter().step_by(8).collect::<Vec<_>>();
    assert_eq!(firsts(2), [2000.0, 2016.0, 2008.0, 2024.0, 2032.0, 2048.0, 2040.0, 2056.0]);
    assert_eq!(firsts(3), [3000.0, 3016.0, 3008.0, 3024.0]);
    assert_eq!(firsts(4), [4000.0, 4008.0, 4016.0, 4024.0]);
    let config = model.config().unwrap();
    for (key, value) in [("vocab_size", 5), ("head_dim", 4), ("num_key_value_heads", 1)] {
        assert_eq!(config[key], value, "{key}");
    }
    assert_eq!(config["rms_norm_eps"], 1e-5);
    assert_eq!(config["tie_word_embeddings"], true);
    // The vocabulary is missing, which a note says.
    let notes = model.notes();
    assert!(notes.len() == 1 && notes[0].contains("there is no tokenizer"), "{notes:?}");
    assert_eq!(model.sidecars().unwrap(), open(&llama()).sidecars().unwrap());
}

#[test]
fn what_cannot_be_translated_keeps_its_names_and_says_why() {
    let cases: Vec<(GgufFile, &str)> = vec![
        (gguf(), "general.architecture is missing"),
        (gguf().pair("general.architecture", 4, &number(1)), "general.architecture is missing"),
        (gguf().pair("general.architecture", 8, &string("gemma3")), "\"gemma3\"; llama, qwen2, qwen3, gpt2"),
        (gguf().pair("general.architecture", 8, &string("llama")), "llama.embedding_length is missing"),
        (llama().pair("llama.expert_count", 4, &number(8)), "mixtures of experts"),
        (llama().pair("llama.rope.dimension_count", 4, &number(2)), "only a part of each head"),
        (llama().pair("llama.attention.key_length", 4, &number(3)), "heads of 3 elements"),
        (
            llama().pair("llama.attention.key_length", 4, &number(6)),
            "\"blk.0.attn_q.weight\" of shape [8, 8]",
        ),
        (llama().pair("llama.rope.scaling.type", 8, &string("x")), "\"x\" is not known"),
        (llama().pair("llama.rope.freq_base", 8, &string("x")), "llama.rope.freq_base is no positive number"),
        (llama().tensor("blk.0.attn_q.bias", &[8], 0, &[0; 32]), "only some projections"),
        (
            llama().tensor("blk.1.attn_norm.weight", &[8], 0, &[0; 32]),
            "\"blk.1.attn_norm.weight\" is none of",
        ),
        (
            llama().tensor("blk.00.attn_norm.weight", &[8], 0, &[0; 32]),
            "\"blk.00.attn_norm.weight\" is none of",
        ),
        (
            llama().tensor("blk.0.attn_q_norm.weight", &[4], 0, &[0; 16]),
            "\"blk.0.attn_q_norm.weight\" is none of",
        ),
        (llama().tensor("rope_freqs.weight", &[2], 0, &[0; 8]), "no factors of Llama 3's scaling"),
    ];
    for (file, words) in cases {
        let model = open(&file);
        assert!(model.config().is_none(), "{words}");
        let notes = model.notes();
        assert!(
            notes.len() == 1 && notes[0].contains(words) && notes[0].starts_with("m.gguf: "),
            "{words}: {notes:?}"
        );
        let sidecars = model.sidecars().unwrap();
        assert!(sidecars.len() == 1 && sidecars[0].path == "gguf_metadata.json", "{words}");
        if let Some(first) = model.tensors().first() {
            assert_eq!(first.name, "token_embd.weight", "{words}");
        }
    }
}

#[test]
fn conv1d_weights_are_transposed_whatever_they_are_spelled_in() {
    let base = |kind: u32, dims: &[u64], bytes: &[u8]| {
        let file = gguf()
            .pair("general.architecture", 8, &string("gpt2"))
            .pair("gpt2.block_count", 4, &number(1))
            .pair("gpt2.embedding_length", 4, &number(64))
            .pair("gpt2.attention.head_count", 4, &number(2))
            .pair("gpt2.attention.layer_norm_epsilon", 6, &1e-5f32.to_le_bytes())
            .tensor("token_embd.weight", &[64, 2], 0, &[0; 512])
            .tensor("position_embd.weight", &[64, 3], 0, &[0; 768]);
        file.tensor("blk.0.ffn_up.weight", dims, kind, bytes)
    };
    let q8 = block_bytes(Blocks::Q8_0, &[0]);
    let dims = [64, 32];
    let widened_blocks = {
        let mut out = vec![0.0; 2048];
        Encoding::Blocks(Blocks::Q8_0).widen(&q8, 0, &mut out);
        out
    };
    let f16s: Vec<u8> = widened_blocks.iter().flat_map(|w| f16::from_f32(*w).to_le_bytes()).collect();
    let narrow: Vec<f32> = widened_blocks.iter().map(|w| f16::from_f32(*w).to_f32()).collect();
    for (kind, bytes, stored, dtype) in
        [(8, &q8, &widened_blocks, Dtype::F32), (1, &f16s, &narrow, Dtype::F16)]
    {
        let model = open(&base(kind, &dims, bytes));
        assert_eq!(model.config().unwrap()["n_positions"], 3);
        let info = &model.tensors()[2];
        assert_eq!((info.name.as_str(), &info.shape[..]), ("transformer.h.0.mlp.c_fc.weight", &[64, 32][..]));
        assert_eq!(info.encoding, Encoding::Plain(dtype));
        let turned = widened(&model, 2);
        for (row, col) in [(0, 0), (1, 0), (0, 1), (31, 63), (17, 40)] {
            assert_eq!(turned[col * 32 + row], stored[row * 64 + col]);
        }
    }
}
