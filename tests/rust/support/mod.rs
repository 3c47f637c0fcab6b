//! Small artifacts to test on, and a way to change an artifact's index and seal it again.
#![allow(dead_code, reason = "each test binary uses some of it")]

pub mod gguf;
pub mod models;
pub mod reseal;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;
use tenpak::artifact::{Finished, NewEntry, Writer};
use tenpak::codec::{self, Codec};
use tenpak::runner;
use tenpak::tensor::{Dtype, Encoding, Tensor};

/// Numbers that look random and are the same on every machine.
pub fn numbers(seed: u64) -> impl Iterator<Item = f32> {
    let mut state = seed.wrapping_mul(2).wrapping_add(1);
    std::iter::repeat_with(move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 40) as f32 / (1u64 << 23) as f32 - 1.0) * 0.1
    })
}

/// A tensor of such numbers.
pub fn tensor(seed: u64, shape: &[usize], dtype: Dtype) -> Tensor<'static> {
    let weights: Vec<f32> = numbers(seed).take(shape.iter().product()).collect();
    let mut bytes = vec![0; weights.len() * dtype.size()];
    dtype.narrow(&weights, &mut bytes).unwrap();
    Tensor { shape: shape.to_vec(), encoding: Encoding::Plain(dtype), bytes: Cow::Owned(bytes) }
}

pub fn new_entry(name: &str, tensor: &Tensor<'_>, codec: &Codec, axis: usize, exponent: i32) -> NewEntry {
    let exponent = (exponent != 0).then(|| ("exponent".to_owned(), exponent.into()));
    NewEntry {
        name: name.to_owned(),
        shape: tensor.shape.iter().map(|&n| n as u64).collect(),
        dtype: tensor.encoding.dtype(),
        codec: codec.name.to_owned(),
        codec_version: codec.version,
        axis: axis as u32,
        params: BTreeMap::from_iter(exponent),
    }
}

/// Encodes a tensor and writes it.
pub fn put(writer: &mut Writer, name: &str, tensor: &Tensor<'_>, codec: &Codec, axis: usize) {
    let encoded = runner::encode(tensor, axis, codec, None, false).unwrap();
    let entry = new_entry(name, tensor, codec, axis, encoded.outcome.exponent);
    let names = codec.layout.parts.iter().map(|p| p.name);
    let parts: Vec<_> = names.zip(encoded.parts.iter().map(Vec::as_slice)).collect();
    writer.tensor(entry, &parts).unwrap();
}

/// An artifact with every codec, kept tensors, an alias and embedded files.
pub fn small_artifact(path: &Path) -> Finished {
    let mut writer = Writer::create(path, true, 0, codec::ALL[0].name).unwrap();
    for (i, codec) in codec::ALL.iter().enumerate() {
        put(&mut writer, codec.name, &tensor(i as u64, &[3, 37], Dtype::F32), codec, 1);
    }
    let kept = tensor(77, &[5], Dtype::BF16);
    writer.tensor(NewEntry::kept("norm", vec![5], Dtype::BF16), &[("data", &kept.bytes)]).unwrap();
    writer.tensor(NewEntry::kept("none", vec![0, 4], Dtype::I64), &[("data", &[])]).unwrap();
    writer.alias("tied", codec::ALL[0].name).unwrap();
    writer.file("config.json", b"{\"a\": 1}\n").unwrap();
    writer.file("sub/empty.txt", b"").unwrap();
    writer.finish().unwrap()
}
