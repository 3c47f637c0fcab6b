//! The artifact: what is written is read, and nothing else is.

mod support;

use proptest::prelude::*;
use rayon::prelude::*;
use std::collections::BTreeMap;
use support::reseal::{index_of, reseal_header, with_index};
use support::{new_entry, put, small_artifact, tensor};
use tenpak::artifact::{ArtifactFile, Limits, NewEntry, Writer};
use tenpak::codec;
use tenpak::tensor::Dtype;
use tenpak::{Kind, Result, runner};

fn small() -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("small.tenpak");
    small_artifact(&path);
    std::fs::read(path).unwrap()
}

fn open(bytes: &[u8]) -> Result<ArtifactFile> {
    ArtifactFile::from_bytes(bytes.to_vec(), &Limits::default())
}

fn verify(file: &ArtifactFile) -> Result<()> {
    file.verify(&|_, _| Ok(())).map(|_| ())
}

fn index_text(bytes: &[u8]) -> String {
    String::from_utf8(index_of(bytes).unwrap().to_vec()).unwrap()
}

#[test]
fn every_codec_shape_and_axis_comes_back_as_the_runner_gives_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.tenpak");
    let shapes: &[(&[usize], usize)] = &[
        (&[], 0),
        (&[1], 0),
        (&[0, 5], 1),
        (&[5, 0], 1),
        (&[4, 16], 1),
        (&[3, 259], 1),
        (&[33, 7], 0),
        (&[2, 19, 5], 1),
        (&[2, 3, 40], 2),
    ];
    let name = |codec: &str, shape: &[usize], axis: usize| format!("{codec} {shape:?} {axis}");
    let mut writer = Writer::create(&path, false, 0, "int4_opt_v1").unwrap();
    for codec in codec::ALL {
        for (i, &(shape, axis)) in shapes.iter().enumerate() {
            put(
                &mut writer,
                &name(codec.name, shape, axis),
                &tensor(i as u64, shape, Dtype::F16),
                codec,
                axis,
            );
        }
        let mut huge = tensor(9, &[2, 20], Dtype::F32);
        huge.bytes.to_mut()[..4].copy_from_slice(&1e30f32.to_le_bytes());
        put(&mut writer, &format!("{} huge", codec.name), &huge, codec, 1);
    }
    let finished = writer.finish().unwrap();

    let file = ArtifactFile::open(&path).unwrap();
    verify(&file).unwrap();
    assert_eq!(file.root(), finished.root);
    assert_eq!(file.file_len(), finished.file_len);
    assert_eq!(file.file_len(), std::fs::metadata(&path).unwrap().len());
    for codec in codec::ALL {
        for (i, &(shape, axis)) in shapes.iter().enumerate() {
            let original = tensor(i as u64, shape, Dtype::F16);
            let encoded = runner::encode(&original, axis, codec, None, false).unwrap();
            let parts: Vec<_> = encoded.parts.iter().map(Vec::as_slice).collect();
            let entry = file.find(&name(codec.name, shape, axis)).unwrap();
            assert_eq!((entry.dtype, entry.elements()), (Dtype::F16, original.len() as u64));
            for dtype in [Dtype::F32, Dtype::F16, Dtype::BF16] {
                let mut want = vec![0; original.len() * dtype.size()];
                let mut got = vec![1; want.len()];
                let exponent = encoded.outcome.exponent;
                runner::decode(codec, exponent, shape, axis, &parts, dtype, &mut want).unwrap();
                file.decode(entry, dtype, &mut got).unwrap();
                assert_eq!(got, want, "{}", entry.name);
            }
        }
        let entry = file.find(&format!("{} huge", codec.name)).unwrap();
        let mut out = vec![0; 160];
        file.decode(entry, Dtype::F32, &mut out).unwrap();
        let first = f32::from_le_bytes(out[..4].try_into().unwrap());
        assert!((first / 1e30 - 1.0).abs() < 0.1, "{first} under {}", codec.name);
    }
}

#[test]
fn kept_tensors_aliases_and_files_come_back() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.tenpak");
    let mut writer = Writer::create(&path, false, 0, "keep").unwrap();
    for &dtype in Dtype::ALL {
        let bytes: Vec<u8> = (0..6 * dtype.size() as u8).collect();
        writer.tensor(NewEntry::kept(dtype.name(), vec![2, 3], dtype), &[("data", &bytes)]).unwrap();
    }
    let weights = [1.0f32, -0.5, 65504.0, 3.0e38];
    let bytes: Vec<u8> = weights.iter().flat_map(|w| w.to_le_bytes()).collect();
    writer.tensor(NewEntry::kept("weights", vec![4], Dtype::F32), &[("data", &bytes)]).unwrap();
    writer.alias("tied", "weights").unwrap();
    writer.file("tokenizer/a.json", b"abc").unwrap();
    writer.finish().unwrap();

    let file = ArtifactFile::open(&path).unwrap();
    let report = file
        .verify(&|done, total| {
            assert!(done <= total);
            Ok(())
        })
        .unwrap();
    assert_eq!((report.tensors, report.parts, report.files), (Dtype::ALL.len() + 1, Dtype::ALL.len() + 1, 1));
    assert_eq!((file.version(), file.codec()), (1, "keep"));
    for &dtype in Dtype::ALL {
        let entry = file.find(dtype.name()).unwrap();
        let mut out = vec![0; 6 * dtype.size()];
        file.decode(entry, dtype, &mut out).unwrap();
        assert_eq!(out, (0..6 * dtype.size() as u8).collect::<Vec<_>>());
        if !dtype.is_weight() {
            let error = file.decode(entry, Dtype::F32, &mut [0; 24]).unwrap_err();
            assert!(error.kind() == Kind::Usage && error.to_string().contains(dtype.name()), "{error}");
        }
    }
    let entry = file.find("tied").unwrap();
    assert_eq!(entry.name, "weights");
    let mut out = [0; 8];
    file.decode(entry, Dtype::BF16, &mut out).unwrap();
    assert_eq!(out, [0x80, 0x3f, 0x00, 0xbf, 0x80, 0x47, 0x62, 0x7f]);
    assert_eq!(file.decode(entry, Dtype::F16, &mut [0; 7]).unwrap_err().kind(), Kind::Usage);
    assert_eq!(file.checked_part(&file.files()[0].part, "file").unwrap(), b"abc");

    let error = file.find("weight").unwrap_err();
    assert!(error.kind() == Kind::Usage && error.to_string().contains("did you mean \"weights\""), "{error}");
}

#[test]
fn the_same_bytes_for_any_number_of_threads() {
    let make = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("m.tenpak");
            let mut writer = Writer::create(&path, false, 0, "int4_opt_v1").unwrap();
            put(&mut writer, "big", &tensor(1, &[700, 900], Dtype::F32), &codec::ALL[0], 1);
            put(&mut writer, "turned", &tensor(2, &[300, 200], Dtype::F32), &codec::ALL[0], 0);
            writer.finish().unwrap();
            std::fs::read(&path).unwrap()
        })
    };
    let one = make(1);
    assert!(one == make(2) && one == make(7));
}

#[test]
fn every_truncation_is_refused() {
    let bytes = small();
    verify(&open(&bytes).unwrap()).unwrap();
    (0..bytes.len()).into_par_iter().for_each(|len| {
        let error = open(&bytes[..len]).unwrap_err();
        assert_eq!(error.kind(), Kind::Artifact, "{error}");
    });
    let mut longer = bytes.clone();
    longer.push(0);
    assert!(open(&longer).is_err());
    longer.extend(&bytes);
    assert!(open(&longer).is_err());
}

#[test]
fn every_single_bit_flip_is_refused() {
    let bytes = small();
    let sound = open(&bytes).unwrap();
    let mut owner = vec![None; bytes.len()];
    for (i, entry) in sound.tensors().iter().enumerate() {
        for part in entry.parts.values() {
            owner[part.off as usize..(part.off + part.len) as usize].fill(Some(i));
        }
    }
    (0..bytes.len()).into_par_iter().for_each(|at| {
        for bit in 0..8 {
            let mut flipped = bytes.clone();
            flipped[at] ^= 1 << bit;
            let Ok(file) = ArtifactFile::from_bytes(flipped, &Limits::default()) else { continue };
            let error = verify(&file).expect_err(&format!("bit {bit} of byte {at} went unnoticed"));
            assert_eq!(error.kind(), Kind::Artifact, "{error}");
            // And without verify, damaged weights are not handed out, and sound ones are.
            if let Some(i) = owner[at].filter(|_| bit == at % 8) {
                for (j, entry) in file.tensors().iter().enumerate() {
                    let mut out = vec![0; entry.elements() as usize * entry.dtype.size()];
                    assert_eq!(file.decode(entry, entry.dtype, &mut out).is_err(), i == j, "byte {at}");
                }
            }
        }
    });
}

#[test]
fn an_index_that_lies_is_refused_with_a_reason() {
    let bytes = small();
    let text = index_text(&bytes);
    let first = &text[text.find("\"off\":").unwrap()..][..20];
    let off = first[6..].split(',').next().unwrap();
    let cases: &[(&str, &str, &str)] = &[
        // What is replaced, by what, what the error says.
        ("\"shape\":[3,37]", "\"shape\":[3,39]", "bytes; shape"),
        ("\"shape\":[3,37]", "\"shape\":[3,37,2]", "bytes; shape"),
        ("\"shape\":[3,37]", "\"shape\":[4,37]", "bytes; shape"),
        ("\"shape\":[3,37]", "\"shape\":[18446744073709551615,37]", "2^56"),
        ("\"shape\":[3,37]", "\"shape\":[0,72057594037927936]", "2^56"),
        ("\"shape\":[3,37]", "\"shape\":[1,1,1,1,1,1,1,3,37]", "dimensions"),
        ("\"shape\":[3,37]", "\"shape\":[-3,37]", "malformed"),
        ("\"shape\":[3,37]", "\"shape\":[3.0,37]", "malformed"),
        ("\"shape\":[3,37]", "\"shape\":[3,1e400]", "malformed"),
        ("\"axis\":1", "\"axis\":2", "axis 2 does not exist"),
        ("\"axis\":1", "\"axis\":4294967296", "malformed"),
        ("\"dtype\":\"F32\"", "\"dtype\":\"I8\"", "cannot hold dtype I8"),
        ("\"dtype\":\"F32\"", "\"dtype\":\"F31\"", "dtype \"F31\" is not known"),
        ("\"params\":{}", "\"params\":{\"exponent\":0}", "cannot be 0"),
        ("\"params\":{}", "\"params\":{\"exponent\":128}", "cannot be 128"),
        ("\"params\":{}", "\"params\":{\"exponent\":18446744073709551615}", "cannot be"),
        ("\"params\":{}", "\"params\":{\"exponent\":\"1\"}", "cannot be"),
        ("\"params\":{}", "\"params\":{\"exponent\":1.5}", "only integers"),
        ("\"params\":{}", "\"params\":{\"exponent\":[1]}", "only integers"),
        ("\"params\":{}", "\"params\":{\"colour\":1}", "\"colour\" cannot be"),
        (
            "\"params\":{},\"parts\":{\"data\"",
            "\"params\":{\"exponent\":1},\"parts\":{\"data\"",
            "kept tensor has no",
        ),
        ("\"codes\":", "\"cades\":", "codes is missing"),
        (
            "\"codes\":",
            "\"aaaa\":{\"b3\":\"B3\",\"len\":0,\"off\":256,\"xxh3\":\"0000000000000000\"},\"codes\":",
            "no part",
        ),
        ("\"data\":", "\"date\":", "data is missing"),
        (
            &format!("\"off\":{off},"),
            &format!("\"off\":{},", off.parse::<u64>().unwrap() + 256),
            "next multiple",
        ),
        (&format!("\"off\":{off},"), "\"off\":18446744073709551615,", "next multiple"),
        (&format!("\"off\":{off},"), "\"off\":0,", "next multiple"),
        ("\"path\":\"config.json\"", "\"path\":\"../config.json\"", "component . or .."),
        ("\"path\":\"config.json\"", "\"path\":\"/config.json\"", "starts with /"),
        ("\"path\":\"config.json\"", "\"path\":\"sub/empty.txt\"", "two embedded files"),
        ("\"name\":\"none\"", "\"name\":\"norm\"", "two tensors"),
        ("\"name\":\"none\"", "\"name\":\"tied\"", "both a tensor and an alias"),
        ("\"name\":\"none\"", "\"name\":\"no\\nne\"", "control character"),
        ("\"name\":\"none\"", "\"name\":\"\\u006eone\"", "not canonical"),
        ("\"name\":\"none\"", "\"name\":\"\u{202e}\u{7f}\"", "control character"),
        ("\"name\":\"none\"", "\"name\":\"LONG\"", "1025 bytes"),
        ("\"tied\":\"int4_opt_v1\"", "\"tied\":\"tied\"", "is no tensor"),
        ("\"tied\":\"int4_opt_v1\"", "\"tied\":\"x\"", "is no tensor"),
        ("\"writer\":", "\"extra\":1,\"writer\":", "malformed"),
        ("\"len\":10,", "\"len\":10,\"len\":10,", "malformed"),
        ("\"len\":10,", "\"len\":266,", "data has 266 bytes"),
        ("{\"aliases\"", "[{\"aliases\"", "malformed"),
    ];
    for (from, to, reason) in cases {
        assert!(text.contains(from), "{from} is not in {text}");
        let to = to.replace("LONG", &"x".repeat(1025)).replace("B3", &"0".repeat(64));
        let error = open(&with_index(&bytes, text.replacen(from, &to, 1).as_bytes())).expect_err(&to);
        assert!(error.kind() == Kind::Artifact && error.to_string().contains(reason), "{to}: {error}");
    }
    // Upper-case digits are a second spelling.
    let at = text.find("\"b3\":\"").unwrap() + 6;
    let upper = format!("{}{}{}", &text[..at], text[at..at + 64].to_uppercase(), &text[at + 64..]);
    assert!(open(&with_index(&bytes, upper.as_bytes())).unwrap_err().to_string().contains("not canonical"));
    // Nesting must not exhaust the stack, wherever it is.
    for open_bracket in ["[", "{\"a\":"] {
        let deep = open_bracket.repeat(100_000);
        assert!(open(&with_index(&bytes, deep.as_bytes())).is_err());
        let inside = text.replacen("\"params\":{}", &format!("\"params\":{{\"x\":{deep}"), 1);
        assert!(open(&with_index(&bytes, inside.as_bytes())).is_err());
    }
    assert!(open(&with_index(&bytes, b"\xff")).is_err());
    assert!(open(&with_index(&bytes, b"")).is_err());
}

#[test]
fn what_is_newer_is_unsupported_and_not_damaged() {
    let bytes = small();
    let header = |at: usize, value: u8| {
        let mut changed = bytes.clone();
        changed[at] = value;
        reseal_header(&mut changed);
        open(&changed)
    };
    for (at, words) in [(8, "version 2"), (16, "incompat bits 0x2")] {
        let error = header(at, 2).unwrap_err();
        assert!(error.kind() == Kind::Unsupported && error.to_string().contains(words), "{error}");
    }
    verify(&header(20, 1).unwrap()).unwrap();
    for at in [12, 24, 30] {
        assert_eq!(header(at, 1).unwrap_err().kind(), Kind::Artifact);
    }

    let text = index_text(&bytes);
    let codec = "\"codec\":\"int8_sym_v1\",\"codec_version\":1";
    for newer in
        ["\"codec\":\"int9_v1\",\"codec_version\":1", "\"codec\":\"int8_sym_v1\",\"codec_version\":2"]
    {
        let file = open(&with_index(&bytes, text.replacen(codec, newer, 1).as_bytes())).unwrap();
        verify(&file).unwrap();
        let entry = file.find("int8_sym_v1").unwrap();
        let error = file.decode(entry, Dtype::F32, &mut [0; 3 * 37 * 4]).unwrap_err();
        assert!(error.kind() == Kind::Unsupported && error.to_string().contains("newer tenpak"), "{error}");
        // The others are read as ever.
        file.decode(file.find("norm").unwrap(), Dtype::BF16, &mut [0; 10]).unwrap();
    }
}

#[test]
fn limits_hold_and_can_be_raised() {
    let bytes = small();
    let open_with = |limits| ArtifactFile::from_bytes(bytes.clone(), &limits);
    let tensors = codec::ALL.len() + 3;
    let index_bytes = index_of(&bytes).unwrap().len() as u64;
    let exact = Limits { tensors, files: 2, name_bytes: 20, index_bytes };
    open_with(exact).unwrap();
    assert!(open_with(Limits { tensors: tensors - 1, ..exact }).is_err());
    assert!(open_with(Limits { files: 1, ..exact }).is_err());
    assert!(open_with(Limits { name_bytes: 10, ..exact }).is_err());
    assert!(open_with(Limits { index_bytes: index_bytes - 1, ..exact }).is_err());
}

#[test]
fn other_files_are_told_apart() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x");
    for (bytes, words) in [
        (&b""[..], "is empty"),
        (b"GGUF\x03\0\0\0", "no .tenpak artifact"),
        (b"\x89TPK\n\x1a\n and more", "text mode"),
        (b"\x89TPK\r\n\x1a\n", "cut short"),
    ] {
        std::fs::write(&path, bytes).unwrap();
        let error = ArtifactFile::open(&path).unwrap_err();
        assert!(error.kind() == Kind::Artifact && error.to_string().contains(words), "{error}");
        assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
    }
    assert_eq!(ArtifactFile::open(folder.path()).unwrap_err().kind(), Kind::Usage);
    assert_eq!(ArtifactFile::open(&folder.path().join("none")).unwrap_err().kind(), Kind::Io);
}

#[test]
fn the_writer_refuses_what_no_reader_would_take() {
    let folder = tempfile::tempdir().unwrap();
    let mut writer = Writer::create(&folder.path().join("m"), false, 0, "keep").unwrap();
    let kept = |name: &str| NewEntry::kept(name, vec![2], Dtype::U8);
    writer.tensor(kept("a"), &[("data", b"ab")]).unwrap();
    assert_eq!(writer.tensor(kept("a"), &[("data", b"ab")]).unwrap_err().kind(), Kind::Input);
    assert_eq!(writer.tensor(kept("b\n"), &[("data", b"ab")]).unwrap_err().kind(), Kind::Input);
    assert!(writer.tensor(kept("b"), &[("data", b"abc")]).is_err());
    assert!(writer.tensor(kept("b"), &[("date", b"ab")]).is_err());
    assert!(writer.tensor(kept("b"), &[]).is_err());
    assert!(writer.tensor(kept("b"), &[("data", b"ab"), ("data", b"ab")]).is_err());
    let t = tensor(1, &[2, 16], Dtype::F32);
    let int8 = codec::find("int8_sym_v1").unwrap();
    let (codes, scales) = ([0u8; 32], [0u8; 8]);
    let mut bad = new_entry("c", &t, int8, 1, 0);
    assert!(writer.tensor(bad.clone(), &[("scales", &scales), ("codes", &codes)]).is_err());
    assert!(writer.tensor(bad.clone(), &[("codes", &codes)]).is_err());
    bad.codec = "int9".to_owned();
    assert!(writer.tensor(bad.clone(), &[("codes", &codes), ("scales", &scales)]).is_err());
    bad.codec = int8.name.to_owned();
    bad.params = BTreeMap::from([("exponent".to_owned(), 1.5.into())]);
    assert!(writer.tensor(bad, &[("codes", &codes), ("scales", &scales)]).is_err());
    assert!(writer.alias("a", "a").is_err());
    assert!(writer.alias("d", "missing").is_err());
    writer.alias("d", "a").unwrap();
    assert!(writer.alias("d", "a").is_err());
    assert!(writer.alias("e", "d").is_err());
    assert!(writer.tensor(kept("d"), &[("data", b"ab")]).is_err());
    assert!(writer.file("../x", b"").is_err());
    writer.file("x", b"").unwrap();
    assert!(writer.file("x", b"").is_err());
    writer.finish().unwrap();
    // None of the refused calls left a trace.
    let file = ArtifactFile::open(&folder.path().join("m")).unwrap();
    verify(&file).unwrap();
    assert_eq!((file.tensors().len(), file.aliases().len(), file.files().len()), (1, 1, 1));
}

#[test]
fn verify_can_be_stopped() {
    let file = open(&small()).unwrap();
    let stop = |_, _| Err(tenpak::Error::new(Kind::Interrupted, "stopped"));
    assert_eq!(file.verify(&stop).unwrap_err().kind(), Kind::Interrupted);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_shape_name_and_codec_survive(
        shape in prop::collection::vec(0usize..40, 0..4),
        name in "\\PC{0,40}",
        which in 0..codec::ALL.len(),
        axis in 0usize..3,
        seed: u64,
    ) {
        let axis = axis.min(shape.len().saturating_sub(1));
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m.tenpak");
        let codec = &codec::ALL[which];
        let original = tensor(seed, &shape, Dtype::F32);
        let mut writer = Writer::create(&path, false, 0, codec.name).unwrap();
        put(&mut writer, &name, &original, codec, axis);
        writer.finish().unwrap();
        let file = ArtifactFile::open(&path).unwrap();
        verify(&file).unwrap();
        let entry = file.find(&name).unwrap();
        let mut out = vec![0; original.bytes.len()];
        file.decode(entry, Dtype::F32, &mut out).unwrap();
        // Uniform numbers in ±0.1: no codec of four bits is off by more than a few steps.
        for (a, b) in out.chunks_exact(4).zip(original.bytes.chunks_exact(4)) {
            let (a, b) = (f32::from_le_bytes(a.try_into().unwrap()), f32::from_le_bytes(b.try_into().unwrap()));
            prop_assert!((a - b).abs() < 0.04, "{} for {}", a, b);
        }
    }
}

/// Where the fuzzer starts from.
const SEEDS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fuzz/seeds/artifact");

#[test]
fn the_fuzzer_starts_from_files_that_open() {
    let mut count = 0;
    for seed in std::fs::read_dir(SEEDS).unwrap() {
        let bytes = std::fs::read(seed.unwrap().path()).unwrap();
        let bytes = if bytes.starts_with(b"{") { with_index(&zeros(&[]), &bytes) } else { bytes };
        verify(&open(&bytes).unwrap()).unwrap();
        count += 1;
    }
    assert!(count > codec::ALL.len());
}

/// An artifact whose parts are zeros up to byte 1,024, as the fuzz target puts in front of a bare index.
fn zeros(codecs: &[&codec::Codec]) -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m");
    let mut writer = Writer::create(&path, false, 0, "x").unwrap();
    for codec in codecs {
        let sizes = codec.layout.part_bytes(2, 9).unwrap();
        let parts: Vec<_> = sizes.iter().map(|&n| vec![0; n as usize]).collect();
        let parts: Vec<_> =
            codec.layout.parts.iter().map(|p| p.name).zip(parts.iter().map(Vec::as_slice)).collect();
        let t = tensor(0, &[2, 9], Dtype::F32);
        writer.tensor(new_entry("a", &t, codec, 1, -3), &parts).unwrap();
        writer.alias("b", "a").unwrap();
    }
    let fill = 3 - codecs.iter().map(|c| c.layout.parts.len()).sum::<usize>().min(3);
    for i in 0..fill {
        writer.file(&format!("f/{i}"), &[0; 256]).unwrap();
    }
    writer.finish().unwrap();
    std::fs::read(&path).unwrap()
}

#[test]
#[ignore = "writes tests/fuzz/seeds/artifact; run it when the format changes"]
fn write_fuzz_seeds() {
    let folder = std::path::Path::new(SEEDS);
    std::fs::create_dir_all(folder).unwrap();
    for codec in codec::ALL {
        let bytes = zeros(&[codec]);
        // Layouts of four parts do not fit in front of a bare index: their seed is a whole file.
        let seed = if codec.layout.parts.len() <= 3 { index_of(&bytes).unwrap() } else { &bytes };
        std::fs::write(folder.join(codec.name), seed).unwrap();
    }
    let path = folder.join("kept");
    let mut writer = Writer::create(&path, true, 0, "keep").unwrap();
    writer.tensor(NewEntry::kept("é", vec![2, 3], Dtype::BF16), &[("data", &[1; 12])]).unwrap();
    writer.tensor(NewEntry::kept("", vec![], Dtype::I64), &[("data", &[2; 8])]).unwrap();
    writer.alias("tied", "").unwrap();
    writer.file("a/b.json", b"{}").unwrap();
    writer.finish().unwrap();
}

#[test]
fn the_size_is_known_before_anything_is_written() {
    let bytes = small();
    let file = open(&bytes).unwrap();
    let tensors = file.tensors().iter().map(|entry| {
        let new = NewEntry {
            name: entry.name.clone(),
            shape: entry.shape.clone(),
            dtype: entry.dtype,
            codec: entry.codec.clone(),
            codec_version: entry.codec_version,
            axis: entry.axis,
            params: entry.params.clone(),
        };
        (new, entry.parts_in_order().into_iter().map(|(name, part)| (name, part.len)).collect())
    });
    let files: Vec<_> = file.files().iter().map(|f| (f.path.as_str(), f.part.len)).collect();
    let len = tenpak::artifact::file_len(
        file.codec(),
        file.writer(),
        tensors.collect(),
        file.aliases().clone(),
        &files,
    );
    assert_eq!(len.unwrap(), bytes.len() as u64);
}
