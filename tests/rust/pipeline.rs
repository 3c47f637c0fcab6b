//! Whole models: what the plan decides for names, shapes and configs, and that compressing keeps its promises.

use regex::Regex;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use tempfile::TempDir;
use tenpak::codec::{self, Codec};
use tenpak::input::{self, Model, Sidecar, TensorInfo};
use tenpak::pipeline::{self, CompressOptions, CompressReport, DecompressOptions};
use tenpak::plan::{self, Action, Choice, Options, Role};
use tenpak::tensor::{Dtype, Encoding, Tensor};
use tenpak::{ArtifactFile, Error, Kind, Result, output, runner};

mod support;

/// A model in memory.
#[derive(Default)]
struct Memory {
    infos: Vec<TensorInfo>,
    tensors: Vec<Tensor<'static>>,
    config: Option<serde_json::Value>,
    sidecars: Vec<Sidecar>,
    paths: Vec<PathBuf>,
}

impl Memory {
    fn with(mut self, name: &str, tensor: Tensor<'static>) -> Self {
        self.infos.push(TensorInfo {
            name: name.to_owned(),
            shape: tensor.shape.clone(),
            encoding: tensor.encoding,
        });
        self.tensors.push(tensor);
        self
    }

    /// Different weights in every tensor.
    fn weights(self, name: &str, shape: &[usize]) -> Self {
        let seed = self.infos.len() as u64;
        self.with(name, support::tensor(seed, shape, Dtype::F32))
    }

    fn config(mut self, text: &str) -> Self {
        self.config = Some(serde_json::from_str(text).unwrap());
        self
    }
}

impl Model for Memory {
    fn format(&self) -> &'static str {
        "memory"
    }
    fn tensors(&self) -> &[TensorInfo] {
        &self.infos
    }
    fn read(&self, index: usize) -> Result<Tensor<'_>> {
        Ok(self.tensors[index].clone())
    }
    fn sidecars(&self) -> Result<Vec<Sidecar>> {
        Ok(self.sidecars.clone())
    }
    fn config(&self) -> Option<&serde_json::Value> {
        self.config.as_ref()
    }
    fn paths(&self) -> Vec<PathBuf> {
        self.paths.clone()
    }
}

fn options(codec: &str) -> Options {
    Options {
        codec: codec::find(codec).unwrap(),
        embeddings: Choice::Codec(codec::find("int8_sym_v1").unwrap()),
        rules: Vec::new(),
        axes: Vec::new(),
        strict: false,
    }
}

fn rule(pattern: &str, choice: Choice) -> (Regex, Choice) {
    (Regex::new(pattern).unwrap(), choice)
}

/// What happens to the only tensor of a model.
fn fate(name: &str, shape: &[usize]) -> (String, usize) {
    let model = Memory::default().weights(name, shape);
    fates(&model, &options("int4_opt_v1")).remove(0)
}

fn fates(model: &Memory, options: &Options) -> Vec<(String, usize)> {
    let decisions = plan::plan(model, options).unwrap();
    let text = |action: &Action| match action {
        Action::Keep(reason) => format!("keep: {reason}"),
        Action::Encode(codec) => codec.name.to_owned(),
        Action::Alias(of) => format!("alias of {of}"),
    };
    decisions.iter().map(|d| (text(&d.action), d.axis)).collect()
}

#[test]
fn names_and_shapes_decide() {
    for (name, shape, wanted) in [
        ("model.layers.0.mlp.up_proj.weight", &[64, 64][..], "int4_opt_v1"),
        ("blk.0.attn_output.weight", &[64, 64], "int4_opt_v1"),
        ("encoder.layer.0.output.dense.weight", &[64, 64], "int4_opt_v1"),
        ("bert.encoder.layer.0.attention.output.weight", &[64, 64], "int4_opt_v1"),
        ("model.layers.0.mlp.experts.down_proj", &[4, 64, 64], "int4_opt_v1"),
        ("model.embed_tokens.weight", &[64, 64], "int8_sym_v1"),
        ("transformer.wte.weight", &[64, 64], "int8_sym_v1"),
        ("wpe.weight", &[64, 64], "int8_sym_v1"),
        ("lm_head.weight", &[64, 64], "int8_sym_v1"),
        ("gpt_neox.embed_in.weight", &[64, 64], "int8_sym_v1"),
        ("token_embd.weight", &[64, 64], "int8_sym_v1"),
        ("output.weight", &[64, 64], "int8_sym_v1"),
        ("model.norm.weight", &[64], "keep: norm, bias or scalar"),
        ("layers.0.attn.bias", &[64], "keep: norm, bias or scalar"),
        ("scale", &[], "keep: norm, bias or scalar"),
        ("layers.0.mlp.experts.gate_up_proj_bias", &[8, 64], "keep: norm, bias or scalar"),
        ("layers.0.self_attn.q_norm.weight", &[8, 64], "keep: norm, bias or scalar"),
        (
            "block.0.layer.0.SelfAttention.relative_attention_bias.weight",
            &[32, 64],
            "keep: norm, bias or scalar",
        ),
        ("model.layers.0.mlp.gate.weight", &[8, 64], "keep: router"),
        ("model.layers.0.mlp.router.weight", &[8, 64], "keep: router"),
        ("blk.0.ffn_gate_inp.weight", &[8, 64], "keep: router"),
        ("model.layers.0.mlp.gate_proj.weight", &[64, 64], "int4_opt_v1"),
        ("backbone.layers.0.mixer.conv1d.weight", &[64, 1, 4], "keep: convolution"),
        ("backbone.layers.0.mixer.A_log", &[64, 16], "keep: state-space parameter"),
        ("vision.patch_embedding.weight", &[64, 3, 14, 14], "keep: more than three dimensions"),
        ("layers.0.odd.weight", &[64, 1], "keep: too small to gain anything"),
        ("layers.0.none.weight", &[0, 64], "keep: too small to gain anything"),
    ] {
        assert_eq!(fate(name, shape).0, wanted, "{name}");
    }
    let decisions = plan::plan(&Memory::default().weights("wte.weight", &[8, 8]), &options("int4_opt_v1"));
    assert_eq!(decisions.unwrap()[0].role, Role::Embedding);
}

#[test]
fn integers_and_wide_floats_are_kept() {
    for dtype in Dtype::ALL.iter().filter(|d| !d.is_weight()) {
        let bytes = vec![0; 64 * 64 * dtype.size()].into();
        let tensor = Tensor { shape: vec![64, 64], encoding: Encoding::Plain(*dtype), bytes };
        let model = Memory::default().with("layers.0.weight", tensor);
        assert_eq!(fates(&model, &options("int4_opt_v1"))[0].0, "keep: not F32, F16 or BF16");
        let mut asked = options("int4_opt_v1");
        asked.rules.push(rule("layers", Choice::Codec(asked.codec)));
        let error = plan::plan(&model, &asked).err().unwrap();
        assert_eq!(error.kind(), Kind::Usage);
        assert!(error.to_string().contains("layers.0.weight"), "{error}");
        // Masks and indexes are nothing that --strict could miss; floats are.
        let mut strict = options("int4_opt_v1");
        strict.strict = true;
        let is_float = dtype.name().starts_with('F');
        assert_eq!(plan::plan(&model, &strict).is_err(), is_float, "{}", dtype.name());
    }
}

#[test]
fn rules_come_first_and_the_first_of_them_wins() {
    let model = Memory::default()
        .weights("a.weight", &[32, 32])
        .weights("ab.weight", &[32, 32])
        .weights("b.norm", &[32])
        .weights("wte.weight", &[32, 32]);
    let lut = codec::find("int4_lut16_v1").unwrap();
    let mut asked = options("int4_opt_v1");
    asked.rules = vec![
        rule("^a\\.", Choice::Keep),
        rule("^a", Choice::Codec(lut)),
        rule("norm|wte", Choice::Codec(lut)),
    ];
    let codecs: Vec<_> = fates(&model, &asked).into_iter().map(|f| f.0).collect();
    assert_eq!(codecs, ["keep: asked for", "int4_lut16_v1", "int4_lut16_v1", "int4_lut16_v1"]);
    asked.rules.clear();
    asked.embeddings = Choice::Keep;
    asked.strict = true;
    assert_eq!(fates(&model, &asked)[3].0, "keep: asked for");
}

#[test]
fn input_dimensions_of_model_kinds() {
    let conv1d = |config: &str| {
        let model = Memory::default()
            .weights("h.0.attn.c_attn.weight", &[64, 192])
            .weights("h.0.attn.c_proj.weight", &[64, 64])
            .weights("wte.weight", &[64, 64])
            .weights("h.0.attn.c_attn.bias", &[192]);
        let model = if config.is_empty() { model } else { model.config(config) };
        fates(&model, &options("int4_opt_v1")).iter().map(|f| f.1).collect::<Vec<_>>()
    };
    assert_eq!(conv1d(r#"{"model_type":"gpt2"}"#)[..3], [0, 0, 1]);
    // GPT-BigCode has the names, but nn.Linear.
    assert_eq!(conv1d(r#"{"model_type":"gpt_bigcode"}"#)[..3], [1, 1, 1]);
    // Without a config the bias of c_attn, as long as its second dimension, tells about the square c_proj too.
    assert_eq!(conv1d("")[..3], [0, 0, 1]);

    let experts = |config: &str| {
        let model = Memory::default().weights("layers.0.mlp.experts.gate_up_proj", &[4, 64, 96]);
        fates(&model.config(config), &options("int4_opt_v1"))[0].1
    };
    assert_eq!(experts(r#"{"model_type":"gpt_oss"}"#), 1);
    assert_eq!(experts(r#"{"model_type":"llama4","text_config":{"model_type":"llama4_text"}}"#), 1);
    assert_eq!(experts(r#"{"model_type":"qwen3_moe"}"#), 2);

    let mut asked = options("int4_opt_v1");
    asked.axes.push((Regex::new("^w$").unwrap(), 0));
    let model = Memory::default().weights("w", &[64, 96]).weights("v", &[64, 96]);
    assert_eq!(fates(&model, &asked).iter().map(|f| f.1).collect::<Vec<_>>(), [0, 1]);
    asked.axes[0].1 = 2;
    let error = plan::plan(&model, &asked).err().unwrap();
    assert!(error.to_string().contains("\"w\"") && error.kind() == Kind::Usage, "{error}");
}

#[test]
fn equal_weights_are_tied_when_they_are_treated_alike() {
    let same = || support::tensor(9, &[64, 64], Dtype::F32);
    let model = Memory::default()
        .with("embed_tokens.weight", same())
        .with("lm_head.weight", same())
        .with("layers.0.weight", same())
        .with("layers.1.weight", same())
        .with("norm.weight", support::tensor(1, &[64], Dtype::F32))
        .with("other_norm.weight", support::tensor(1, &[64], Dtype::F32));
    let wanted = ["int8_sym_v1", "alias of 0", "int4_opt_v1", "alias of 2"];
    let codecs: Vec<_> = fates(&model, &options("int4_opt_v1")).into_iter().map(|f| f.0).collect();
    assert_eq!(codecs[..4], wanted);
    assert!(codecs[4..].iter().all(|c| c.starts_with("keep")));
}

fn compress(model: &dyn Model, path: &Path, codec: &str, threads: usize) -> CompressReport {
    let options =
        CompressOptions { plan: options(codec), threads, force: true, calibration: None, estimate: true };
    let dry = pipeline::dry_run(model, &options, &|_, _| Ok(())).unwrap();
    let report = pipeline::compress(model, path, &options, &|_, _| Ok(())).unwrap();
    assert_eq!(dry.file_bytes, report.file_bytes);
    assert_eq!(report.file_bytes, fs::metadata(path).unwrap().len());
    report
}

fn mixed() -> Memory {
    let mut model = Memory::default()
        .weights("layers.0.weight", &[70, 130])
        .weights("layers.1.weight", &[33, 257])
        .weights("layers.2.experts", &[3, 20, 48])
        .weights("wte.weight", &[100, 64])
        .weights("norm", &[64])
        .weights("scalar", &[])
        .weights("none", &[0, 5])
        .with("half", support::tensor(40, &[32, 64], Dtype::F16))
        .with("brain", support::tensor(41, &[32, 64], Dtype::BF16));
    let huge: Vec<u8> = support::numbers(3).take(32 * 64).flat_map(|x| (x * 1e30).to_le_bytes()).collect();
    let encoding = Encoding::Plain(Dtype::F32);
    model = model.with("huge", Tensor { shape: vec![32, 64], encoding, bytes: huge.into() });
    let tied = model.tensors[3].clone();
    model = model.with("lm_head.weight", tied);
    model.sidecars.push(Sidecar { path: "config.json".into(), bytes: b"{}".to_vec() });
    model
}

#[test]
fn every_codec_gives_the_same_bytes_for_any_number_of_threads() {
    let folder = TempDir::new().unwrap();
    let model = mixed();
    for codec in codec::ALL {
        let mut files = Vec::new();
        for threads in [1, 2, 7] {
            let path = folder.path().join("m.tenpak");
            compress(&model, &path, codec.name, threads);
            files.push(fs::read(&path).unwrap());
        }
        assert!(files[0] == files[1] && files[1] == files[2], "{}", codec.name);
    }
}

#[test]
fn what_is_stored_is_what_the_runner_encodes() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("m.tenpak");
    let model = mixed();
    for codec in codec::ALL {
        let report = compress(&model, &path, codec.name, 2);
        let artifact = ArtifactFile::open(&path).unwrap();
        artifact.verify(&|_, _| Ok(())).unwrap();
        assert_eq!(artifact.aliases().get("lm_head.weight").map(String::as_str), Some("wte.weight"));
        let mut errors = (0.0, 0.0);
        for (info, tensor) in model.infos.iter().zip(&model.tensors) {
            let entry = artifact.find(&info.name).unwrap();
            let part = |name: &str| artifact.checked_part(&entry.parts[name], "test").unwrap();
            if entry.is_kept() {
                assert!(*part("data") == *tensor.bytes, "{}", info.name);
                continue;
            }
            let used: &Codec = codec::find(&entry.codec).unwrap();
            let encoded = runner::encode(tensor, entry.axis as usize, used, None, true).unwrap();
            for (declared, bytes) in used.layout.parts.iter().zip(&encoded.parts) {
                assert!(*part(declared.name) == **bytes, "{} {}", info.name, declared.name);
            }
            assert_eq!(entry.exponent(), encoded.outcome.exponent, "{}", info.name);
            if info.name != "lm_head.weight" {
                errors.0 += encoded.outcome.squared_error;
                errors.1 += encoded.outcome.squared_norm;
            }
        }
        let stated = report.relative_error.unwrap();
        assert!((stated / (errors.0 / errors.1) - 1.0).abs() < 1e-9, "{stated} {errors:?}");
        assert_eq!(
            report.weights,
            report.groups.iter().filter(|g| g.codec != "alias").map(|g| g.weights).sum::<u64>()
        );
        assert_eq!(report.tensors.len(), model.infos.len());
    }
}

#[test]
fn a_restored_model_holds_what_the_artifact_decodes_to() {
    let folder = TempDir::new().unwrap();
    let (path, target) = (folder.path().join("m.tenpak"), folder.path().join("m.safetensors"));
    let model = mixed();
    compress(&model, &path, "int4_opt_v1", 2);
    let artifact = ArtifactFile::open(&path).unwrap();
    for dtype in [None, Some(Dtype::F32), Some(Dtype::F16), Some(Dtype::BF16)] {
        for threads in [1, 3] {
            let output = output::Options { force: true, ..output::Options::default() };
            let options = DecompressOptions { format: None, dtype, threads, output };
            let report = pipeline::decompress(&artifact, &target, &options, &|_, _| Ok(())).unwrap();
            assert_eq!(report.tensors, model.infos.len() as u64);
            assert_eq!(report.files_left_out, ["config.json"]);
            let restored = input::open(&target).unwrap();
            for (i, info) in restored.tensors().iter().enumerate() {
                let entry = artifact.find(&info.name).unwrap();
                let wanted = dtype.unwrap_or(entry.dtype);
                assert_eq!(
                    (info.encoding, &info.shape),
                    (Encoding::Plain(wanted), &entry.extents().unwrap())
                );
                let mut bytes = vec![0; info.shape.iter().product::<usize>() * wanted.size()];
                artifact.decode(entry, wanted, &mut bytes).unwrap();
                assert!(*restored.read(i).unwrap().bytes == bytes[..], "{}", info.name);
            }
        }
    }
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn a_failure_at_any_tensor_leaves_the_old_file_and_nothing_else() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("m.tenpak");
    let broken: Vec<u8> =
        (0..64 * 64).flat_map(|i| if i == 70 { f32::NAN } else { 1.0 }.to_le_bytes()).collect();
    let tensor = Tensor { shape: vec![64, 64], encoding: Encoding::Plain(Dtype::F32), bytes: broken.into() };
    for place in 0..3 {
        let mut model = Memory::default();
        for i in 0..3 {
            model = if i == place {
                model.with("broken.weight", tensor.clone())
            } else {
                model.weights(&format!("fine.{i}.weight"), &[64, 64])
            };
        }
        fs::write(&path, "old").unwrap();
        let options = CompressOptions {
            plan: options("int4_opt_v1"),
            threads: 2,
            force: true,
            calibration: None,
            estimate: true,
        };
        let error = pipeline::compress(&model, &path, &options, &|_, _| Ok(())).err().unwrap();
        assert_eq!(error.kind(), Kind::Input);
        assert!(
            error.to_string().contains("broken.weight") && error.to_string().contains("[1, 6]"),
            "{error}"
        );
        assert!(pipeline::dry_run(&model, &options, &|_, _| Ok(())).is_err());
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(names(folder.path()), ["m.tenpak"]);
    }
}

#[test]
fn progress_ends_the_work_and_goes_from_nothing_to_all() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("m.tenpak");
    let model = mixed();
    let options = CompressOptions {
        plan: options("int4_lut16_v1"),
        threads: 1,
        force: false,
        calibration: None,
        estimate: true,
    };
    let stop = |_: u64, _: u64| Err(Error::new(Kind::Interrupted, "enough"));
    let error = pipeline::compress(&model, &path, &options, &stop).err().unwrap();
    assert_eq!((error.kind(), error.to_string().as_str()), (Kind::Interrupted, "enough"));
    assert!(names(folder.path()).is_empty());

    let calls = AtomicUsize::new(0);
    let report = pipeline::compress(&model, &path, &options, &|done, total| {
        assert!(done <= total);
        if calls.fetch_add(1, Ordering::Relaxed) == 0 {
            assert_eq!(done, 0);
        }
        Ok(())
    });
    assert!(report.is_ok() && calls.into_inner() >= 2);
    // It exists now, and may not be replaced without being asked to.
    let error = pipeline::compress(&model, &path, &options, &|_, _| Ok(())).err().unwrap();
    assert_eq!(error.kind(), Kind::Usage);
}

#[test]
fn an_output_that_is_an_input_is_refused_before_any_work() {
    let folder = TempDir::new().unwrap();
    let input = folder.path().join("shards").join("model-00002.safetensors");
    fs::create_dir(input.parent().unwrap()).unwrap();
    fs::write(&input, "weights").unwrap();
    let link = folder.path().join("link.tenpak");
    fs::hard_link(&input, &link).unwrap();
    let mut model = mixed();
    model.paths = vec![folder.path().join("absent"), input.clone()];
    let options = CompressOptions {
        plan: options("int4_opt_v1"),
        threads: 1,
        force: true,
        calibration: None,
        estimate: true,
    };
    for output in [
        &input,
        &link,
        &folder.path().join("shards/../shards/model-00002.safetensors"),
        &folder.path().join("shards"),
    ] {
        let error = pipeline::compress(&model, output, &options, &|_, _| Ok(())).err().unwrap();
        assert_eq!(error.kind(), Kind::Usage, "{error}");
        assert!(error.to_string().contains("is the input"), "{error}");
    }
    assert_eq!(fs::read(&input).unwrap(), b"weights");
}
