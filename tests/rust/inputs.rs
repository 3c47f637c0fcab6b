//! Every input: what is well formed is read to the last bit, what is malformed gets one sentence with the place.

mod support;

use half::f16;
use proptest::prelude::*;
use std::fs;
use std::path::{Path, PathBuf};
use support::gguf::gguf;
use support::models::{refused, widened};
use tempfile::TempDir;
use tenpak::Kind;
use tenpak::input::{self, Bundle, Gguf, Model, Safetensors};
use tenpak::tensor::Dtype;

// safetensors

fn safetensors(header: &str, data: &[u8]) -> Vec<u8> {
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    file.extend(data);
    file
}

fn one(dtype: &str, shape: &str, offsets: &str) -> String {
    format!(r#"{{"w":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}"#)
}

#[test]
fn malformed_safetensors_are_refused_with_the_place() {
    let long = "n".repeat(1025);
    let two = |a: &str, b: &str| {
        format!(
            r#"{{"a":{{"dtype":"U8","shape":[4],"data_offsets":{a}}},"b":{{"dtype":"U8","shape":[4],"data_offsets":{b}}}}}"#
        )
    };
    let cases: Vec<(String, usize, Kind, Vec<&str>)> = vec![
        ("".into(), 0, Kind::Input, vec!["byte 8", "`{`"]),
        ("[1]".into(), 0, Kind::Input, vec!["byte 8"]),
        ("{".into(), 0, Kind::Input, vec!["header, byte"]),
        (r#"{"w":}"#.into(), 0, Kind::Input, vec!["header, byte 13"]),
        (r#"{} x"#.into(), 0, Kind::Input, vec!["header, byte", "trailing"]),
        (
            one("F32", "[1]", "[0,4]").replace("}}", r#","x":1}}"#),
            4,
            Kind::Input,
            vec!["\"w\"", "unknown key \"x\""],
        ),
        (r#"{"w":["F32",[1],[0,4]]}"#.into(), 4, Kind::Input, vec!["\"w\"", "invalid type"]),
        (r#"{"w":{"dtype":"F32","shape":[1]}}"#.into(), 0, Kind::Input, vec!["\"w\"", "data_offsets"]),
        (
            r#"{"w":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#.into(),
            4,
            Kind::Input,
            vec!["\"w\"", "\"dtype\" stands twice"],
        ),
        (
            format!("{{{0},{0}}}", one("F32", "[0]", "[0,0]").trim_matches(['{', '}']).to_string() + "}"),
            0,
            Kind::Input,
            vec!["\"w\" stands twice"],
        ),
        (r#"{"__metadata__":{"a":1}}"#.into(), 0, Kind::Input, vec!["__metadata__", "string"]),
        (r#"{"__metadata__":{"a":"1","a":"2"}}"#.into(), 0, Kind::Input, vec!["__metadata__", "twice"]),
        (r#"{"__metadata__":{},"__metadata__":{}}"#.into(), 0, Kind::Input, vec!["__metadata__", "twice"]),
        (one("F4", "[2]", "[0,1]"), 1, Kind::Unsupported, vec!["\"w\"", "\"F4\"", "BF16"]),
        (one("f32", "[1]", "[0,4]"), 4, Kind::Unsupported, vec!["\"w\"", "\"f32\""]),
        (one("F32", "[-1]", "[0,4]"), 4, Kind::Input, vec!["\"w\"", "-1"]),
        (one("F32", "[1.5]", "[0,4]"), 4, Kind::Input, vec!["\"w\"", "1.5"]),
        (one("F32", "[1,1,1,1,1,1,1,1,1]", "[0,4]"), 4, Kind::Input, vec!["\"w\"", "9 dimensions"]),
        (one("F32", "[4294967296,4294967296]", "[0,4]"), 4, Kind::Input, vec!["\"w\"", "2^56"]),
        (one("F32", "[18446744073709551615,0]", "[0,0]"), 0, Kind::Input, vec!["\"w\"", "2^56"]),
        (one("F32", "[1]", "[0,18446744073709551615]"), 4, Kind::Input, vec!["\"w\"", "beyond the 4 bytes"]),
        (one("F32", "[1]", "[0,18446744073709551616]"), 4, Kind::Input, vec!["\"w\""]),
        (
            one("F32", "[1]", "[18446744073709551612,0]"),
            4,
            Kind::Input,
            vec!["\"w\"", "end before they begin"],
        ),
        (one("F32", "[2]", "[0,4]"), 4, Kind::Input, vec!["\"w\"", "takes 8 bytes", "hold 4"]),
        (one("F32", "[1]", "[0,8]"), 4, Kind::Input, vec!["\"w\"", "cut short"]),
        (one("F32", "[1]", "[0,4]"), 5, Kind::Input, vec!["1 bytes from byte", "no tensor"]),
        (one("F32", "[1]", "[0,4,8]"), 4, Kind::Input, vec!["\"w\""]),
        (two("[0,4]", "[2,6]"), 6, Kind::Input, vec!["\"b\"", "overlap"]),
        (two("[0,4]", "[0,4]"), 4, Kind::Input, vec!["\"b\"", "overlap"]),
        (two("[0,4]", "[5,9]"), 9, Kind::Input, vec!["\"b\"", "hole", "4 to 5"]),
        (two("[1,5]", "[5,9]"), 9, Kind::Input, vec!["\"a\"", "hole", "0 to 1"]),
        (one("F32", "[1]", "[0,4]").replace("\"w\"", "\"\""), 4, Kind::Input, vec!["name", "empty"]),
        (one("F32", "[1]", "[0,4]").replace("\"w\"", r#""a\nb""#), 4, Kind::Input, vec!["control character"]),
        (
            one("F32", "[1]", "[0,4]").replace("\"w\"", &format!("{long:?}")),
            4,
            Kind::Input,
            vec!["1025 bytes"],
        ),
        ("{\"w\":".to_string() + &"[".repeat(1_000_000), 0, Kind::Input, vec!["\"w\"", "header, byte"]),
        (
            "{\"__metadata__\":{\"a\":".to_string() + &"{\"a\":".repeat(100_000),
            0,
            Kind::Input,
            vec!["__metadata__"],
        ),
    ];
    for (header, data, kind, words) in cases {
        let file = safetensors(&header, &vec![0; data]);
        let case: String = header.chars().take(120).collect();
        refused(
            Safetensors::from_bytes("m.safetensors", file),
            kind,
            &[&["m.safetensors"], &words[..]].concat(),
            &case,
        );
    }
    let bytes: Vec<(Vec<u8>, &[&str])> = vec![
        (vec![1, 2, 3], &["3 bytes"]),
        (u64::MAX.to_le_bytes().to_vec(), &["18446744073709551615", "at most"]),
        (100_000_001u64.to_le_bytes().to_vec(), &["100000001"]),
        (10u64.to_le_bytes().to_vec(), &["length at byte 0 is 10", "only 0 bytes follow"]),
        (safetensors("{}", b"")[..9].to_vec(), &["only 1 bytes follow"]),
        ([&2u64.to_le_bytes()[..], b"{\xff"].concat(), &["header, byte"]),
    ];
    for (file, words) in bytes {
        refused(Safetensors::from_bytes("m", file.clone()), Kind::Input, words, &format!("{file:?}"));
    }
}

#[test]
fn every_dtype_of_safetensors_is_read_without_a_copy() {
    let mut header = String::from(r#"{"__metadata__":{"format":"pt","b":"c"}"#);
    let mut data = Vec::new();
    // Described in reverse: the order of the data counts.
    for dtype in Dtype::ALL.iter().rev() {
        data.splice(0..0, (0..6 * dtype.size()).map(|i| (i * 37) as u8));
    }
    let mut end = data.len();
    for dtype in Dtype::ALL.iter().rev() {
        let begin = end - 6 * dtype.size();
        header += &format!(
            r#","t.{0}":{{"shape":[2,3],"data_offsets":[{begin},{end}],"dtype":"{0}"}}"#,
            dtype.name()
        );
        end = begin;
    }
    header += &format!(
        r#","none":{{"dtype":"F16","shape":[0,7],"data_offsets":[0,0]}},"scalar":{{"dtype":"U8","shape":[],"data_offsets":[{0},{1}]}}}}   "#,
        data.len(),
        data.len() + 1
    );
    data.push(9);
    let model = Safetensors::from_bytes("m", safetensors(&header, &data)).unwrap();
    let names: Vec<&str> = model.tensors().iter().map(|t| t.name.as_str()).collect();
    assert_eq!(names[0], "none");
    assert_eq!(names[1..16], Dtype::ALL.iter().map(|d| format!("t.{}", d.name())).collect::<Vec<_>>());
    assert_eq!(names[16], "scalar");
    for (i, info) in model.tensors().iter().enumerate() {
        let tensor = model.read(i).unwrap();
        assert!(matches!(tensor.bytes, std::borrow::Cow::Borrowed(_)));
        assert_eq!(tensor.bytes.len() as u64, info.encoding.byte_len(tensor.len() as u64).unwrap());
        if info.shape == [2, 3] {
            assert!(tensor.bytes.iter().enumerate().all(|(i, &b)| b == (i * 37) as u8), "{}", info.name);
        }
    }
    assert_eq!(model.read(16).unwrap().bytes[0], 9);
    assert_eq!(Safetensors::from_bytes("m", safetensors("{}", b"")).unwrap().tensors().len(), 0);
}

// The JSON bundle

#[test]
fn malformed_bundles_are_refused_with_the_place() {
    let w = |tensor: &str| format!(r#"{{"tensors":{{"w":{tensor}}}}}"#);
    let bomb = |s: &str| s.repeat(1_000_000);
    let cases: Vec<(String, Kind, &[&str])> = vec![
        ("".into(), Kind::Input, &["line 1"]),
        ("[]".into(), Kind::Input, &["an object with tensors"]),
        ("{}".into(), Kind::Input, &["missing", "tensors"]),
        (r#"{"tensors":3}"#.into(), Kind::Input, &["line 1, column 1", "list of tensors"]),
        (r#"{"tensors":[]} x"#.into(), Kind::Input, &["line 1, column 16", "trailing"]),
        (r#"{"tensors":[],"tensors":[]}"#.into(), Kind::Input, &["\"tensors\" stands twice"]),
        (r#"{"tensors":[],"other":1}"#.into(), Kind::Input, &["unknown key \"other\""]),
        (r#"{"format":"else","tensors":[]}"#.into(), Kind::Input, &["\"else\"", "tenpak-bundle"]),
        (r#"{"version":2,"tensors":[],"new":[]}"#.into(), Kind::Unsupported, &["version 2"]),
        (w(r#"{"shape":[2],"data":[1]}"#), Kind::Input, &["\"w\"", "1 numbers", "2 elements"]),
        (
            w(r#"{"shape":[1],"data":[1,2]}"#),
            Kind::Input,
            &["\"w\"", "data[1] (line 1, column 40)", "only 1"],
        ),
        (w(r#"{"shape":[0],"data":[1]}"#), Kind::Input, &["\"w\"", "data[0]"]),
        (w(r#"{"shape":[2],"data":[[1],[2]]}"#), Kind::Input, &["\"w\"", "data[0]", "flat"]),
        (w(r#"{"shape":[2],"data":[1,null]}"#), Kind::Input, &["\"w\"", "data[1]", "null"]),
        (w(r#"{"shape":[2],"data":[1,"x,y"]}"#), Kind::Input, &["\"w\"", "data[1]", "no number"]),
        (w("{\"shape\":[2],\n\"data\":[1,\nNaN]}"), Kind::Input, &["\"w\"", "line 3, column 1", "NaN"]),
        (w(r#"{"shape":[1],"data":[-Infinity]}"#), Kind::Input, &["\"w\"", "Infinity are no JSON"]),
        (
            w("{\"shape\":[2],\"data\":[1,\n 3.5e38]}"),
            Kind::Input,
            &["\"w\"", "data[1] (line 2, column 2)", "beyond F32"],
        ),
        (w(r#"{"shape":[1],"data":[-1e400]}"#), Kind::Input, &["\"w\"", "beyond F32"]),
        (w(r#"{"shape":[1],"dtype":"f16","data":[65520]}"#), Kind::Input, &["\"w\"", "beyond F16"]),
        (w(r#"{"shape":[1],"dtype":"bf16","data":[3.4e38]}"#), Kind::Input, &["\"w\"", "beyond BF16"]),
        (
            w(r#"{"shape":[1],"dtype":"i8","data":[1]}"#),
            Kind::Unsupported,
            &["\"w\"", "\"i8\"", "f32, f16 and bf16"],
        ),
        (w(r#"{"shape":[1],"data":[01]}"#), Kind::Input, &["\"w\"", "line 1"]),
        (w(r#"{"shape":[1],"data":[1,]}"#), Kind::Input, &["\"w\"", "line 1"]),
        (w(r#"{"shape":[1],"data":7}"#), Kind::Input, &["\"w\"", "list of numbers"]),
        (w(r#"{"shape":[1]}"#), Kind::Input, &["\"w\"", "neither data nor data_b64"]),
        (w(r#"{"shape":[1],"data":[1],"data_b64":""}"#), Kind::Input, &["\"w\"", "both"]),
        (w(r#"{"data":[1]}"#), Kind::Input, &["\"w\"", "shape"]),
        (w(r#"{"shape":[1],"shape":[1],"data":[1]}"#), Kind::Input, &["\"w\"", "\"shape\" stands twice"]),
        (w(r#"{"shape":[1],"data":[1],"extra":0}"#), Kind::Input, &["\"w\"", "unknown key \"extra\""]),
        (w(r#"{"name":"w","shape":[1],"data":[1]}"#), Kind::Input, &["\"w\"", "unknown key \"name\""]),
        (w(r#"{"shape":[-1],"data":[1]}"#), Kind::Input, &["\"w\"", "-1"]),
        (w(r#"{"shape":[4294967296,4294967296],"data":[1]}"#), Kind::Input, &["\"w\"", "2^56"]),
        (w(r#"{"shape":[1,1,1,1,1,1,1,1,1],"data":[1]}"#), Kind::Input, &["\"w\"", "9 dimensions"]),
        (w(r#"{"shape":[1],"data_b64":"AAAA"}"#), Kind::Input, &["\"w\"", "holds 3 bytes", "takes 4"]),
        (w(r#"{"shape":[1],"data_b64":"AA*A"}"#), Kind::Input, &["\"w\"", "data_b64"]),
        (w(r#"{"shape":[1],"data_b64":[1]}"#), Kind::Input, &["\"w\"", "string of base64"]),
        (w(r#"{"shape":[1],"data_b64":"AADAfw=="}"#), Kind::Input, &["\"w\"", "element 0 is NaN"]),
        (
            w(r#"{"shape":[2],"dtype":"f16","data_b64":"AAAAfA=="}"#),
            Kind::Input,
            &["\"w\"", "element 1 is inf"],
        ),
        (
            r#"{"tensors":{"w":{"shape":[0],"data":[]},"w":{"shape":[0],"data":[]}}}"#.into(),
            Kind::Input,
            &["\"w\"", "twice"],
        ),
        (
            r#"{"tensors":[{"name":"v","shape":[0],"data":[]},{"name":"v","shape":[0],"data":[]}]}"#.into(),
            Kind::Input,
            &["\"v\"", "twice"],
        ),
        (r#"{"tensors":[{"shape":[0],"data":[]}]}"#.into(), Kind::Input, &["tensors[0]", "name"]),
        (r#"{"tensors":[{"name":"","shape":[0],"data":[]}]}"#.into(), Kind::Input, &["name", "empty"]),
        (bomb("["), Kind::Input, &["line 1"]),
        (bomb("{\"tensors\":"), Kind::Input, &["line 1"]),
        (w(&format!(r#"{{"shape":[1],"data":{}"#, bomb("["))), Kind::Input, &["\"w\"", "line 1"]),
        (w(&format!(r#"{{"shape":[1],"data":{}{}}}"#, bomb("["), bomb("]"))), Kind::Input, &["\"w\""]),
        (w(&format!(r#"{{"shape":{}"#, bomb("["))), Kind::Input, &["\"w\""]),
        ("\u{feff}{}".into(), Kind::Input, &["byte order mark"]),
    ];
    for (text, kind, words) in cases {
        let case: String = text.chars().take(120).collect();
        refused(Bundle::from_bytes("m.json", text.into_bytes()), kind, &[&["m.json"], words].concat(), &case);
    }
    refused(
        Bundle::from_bytes("m", b"{\"tensors\":{\"\xff\":{}}}".to_vec()),
        Kind::Input,
        &["line 1"],
        "UTF-8",
    );
    refused(
        Bundle::from_bytes("m", b"{\"tensors\":{\"w\":{\"shape\":[0],\"data\":[\xff]}}}".to_vec()),
        Kind::Input,
        &["line 1"],
        "UTF-8",
    );
}

#[test]
fn both_forms_of_a_bundle_give_the_same_tensors() {
    let long = r#"{"format":"tenpak-bundle","version":1,"tensors":[
        {"name":"w","shape":[2,3],"dtype":"f32","data":[1, 2.5,-3e-2,4 , 16777217,-0]},
        {"data_b64":"AACAPw==","shape":[],"name":"s"},
        {"name":"h","dtype":"f16","shape":[3],"data":[65504,-1e-8,0.333]},
        {"name":"b","dtype":"bf16","shape":[2],"data_b64":"gD\/Avw=="},
        {"name":"none","shape":[0,4],"data":[]}]}"#;
    let short = r#"{"tensors":{
        "w":{"shape":[2,3],"data":[1,2.5,-0.03,4,16777217,-0]},
        "s":{"shape":[],"data":[1]},
        "h":{"data":[65504,-1e-8,0.333],"shape":[3],"dtype":"f16"},
        "b":{"shape":[2],"dtype":"bf16","data":[1,-1.5]},
        "none":{"shape":[0,4],"data":[ ]}}}"#;
    let long = Bundle::from_bytes("long", long.as_bytes().to_vec()).unwrap();
    let short = Bundle::from_bytes("short", short.as_bytes().to_vec()).unwrap();
    assert_eq!(long.tensors(), short.tensors());
    for i in 0..5 {
        assert_eq!(long.read(i).unwrap().bytes, short.read(i).unwrap().bytes, "{}", long.tensors()[i].name);
    }
    assert_eq!(widened(&long, 0), [1.0, 2.5, -0.03, 4.0, 16_777_216.0, 0.0]);
    assert!(widened(&long, 0)[5].is_sign_negative());
    assert_eq!(widened(&long, 2), [65504.0, -0.0, f16::from_f32(0.333).to_f32()]);
    assert_eq!(widened(&long, 3), [1.0, -1.5]);
    assert!(long.notes().is_empty());
}

#[test]
fn large_bundles_are_read_with_a_word_and_vast_ones_are_not() {
    let mut large = vec![b' '; 100_000_001];
    large.extend(br#"{"tensors":{"w":{"shape":[1],"data":[1]}}}"#);
    let model = Bundle::from_bytes("large.json", large).unwrap();
    let [note] = &model.notes()[..] else { panic!("one note") };
    assert!(note.contains("large.json is 100 MB") && note.contains("safetensors"), "{note}");
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("vast.json");
    fs::File::create(&path).unwrap().set_len((1 << 30) + 1).unwrap();
    refused(input::open(&path), Kind::Input, &["1073741825 bytes", "1024 MiB", "safetensors"], "vast");
}

// Folders and sniffing

fn folder(files: &[(&str, &[u8])]) -> TempDir {
    let folder = TempDir::new().unwrap();
    for (name, bytes) in files {
        fs::write(folder.path().join(name), bytes).unwrap();
    }
    folder
}

fn shard(names: &[&str]) -> Vec<u8> {
    let entries: Vec<String> = (names.iter().enumerate())
        .map(|(i, n)| format!(r#"{n:?}:{{"dtype":"U8","shape":[1],"data_offsets":[{i},{}]}}"#, i + 1))
        .collect();
    let data: Vec<u8> = names.iter().map(|n| n.as_bytes()[0]).collect();
    safetensors(&format!("{{{}}}", entries.join(",")), &data)
}

const INDEX: &str = "model.safetensors.index.json";

#[test]
fn a_sharded_folder_is_one_model() {
    let (one, two) = (shard(&["c", "a"]), shard(&["b"]));
    let index = br#"{"metadata":{"total_size":3},"weight_map":{"a":"m-1.safetensors","b":"m-2.safetensors","c":"m-1.safetensors"}}"#;
    let mut files: Vec<(&str, &[u8])> = vec![
        ("m-2.safetensors", &two),
        ("m-1.safetensors", &one),
        ("consolidated.safetensors", &one),
        (INDEX, index),
        ("config.json", br#"{"model_type":"llama"}"#),
        ("tokenizer.model", b"\x00\xff"),
        ("README.md", b"no"),
        ("LICENSE.txt", b"MIT"),
        ("Notice", b"n"),
    ];
    files.rotate_left(3);
    let dir = folder(&files);
    let model = input::open(dir.path()).unwrap();
    let names: Vec<&str> = model.tensors().iter().map(|t| t.name.as_str()).collect();
    assert_eq!(names, ["c", "a", "b"]);
    for (i, name) in names.iter().enumerate() {
        assert_eq!(*model.read(i).unwrap().bytes, name.as_bytes()[..1]);
    }
    assert_eq!(model.config().unwrap()["model_type"], "llama");
    let sidecars: Vec<String> = model.sidecars().unwrap().into_iter().map(|s| s.path).collect();
    assert_eq!(sidecars, ["config.json", "tokenizer.model", "LICENSE.txt", "Notice"]);
    assert_eq!(model.paths().len(), 7);
    assert!(model.paths().contains(&dir.path().join("m-2.safetensors")));
}

#[test]
fn malformed_folders_are_refused_with_the_place() {
    let (a, ab) = (shard(&["a"]), shard(&["a", "b"]));
    let to = |shard: &str| format!(r#"{{"weight_map":{{"a":{shard:?}}}}}"#).into_bytes();
    let (plain, up, absolute, nested, back, dots, bin, single) = (
        to("s.safetensors"),
        to("../s.safetensors"),
        to("/etc/s.safetensors"),
        to("x/s.safetensors"),
        to("x\\s.safetensors"),
        to(".."),
        to("s.bin"),
        to("model.safetensors"),
    );
    let both = br#"{"weight_map":{"a":"s.safetensors","b":"s.safetensors"}}"#;
    let other = br#"{"weight_map":{"a":"s.safetensors","b":"t.safetensors"}}"#;
    let twice = br#"{"weight_map":{"a":"s.safetensors","a":"s.safetensors"}}"#;
    let bomb = format!("{{\"weight_map\":{}", "[".repeat(1_000_000)).into_bytes();
    let quiet_bomb = format!("{{\"metadata\":{}", "[".repeat(1_000_000)).into_bytes();
    let cut = &a[..a.len() - 1];
    #[allow(clippy::type_complexity)]
    let cases: Vec<(Vec<(&str, &[u8])>, Kind, &[&str])> = vec![
        (vec![], Kind::Input, &["no model in this folder"]),
        (
            vec![("pytorch_model.bin", b"x")],
            Kind::Unsupported,
            &["pytorch_model.bin", "pickle", "safetensors"],
        ),
        (vec![("m.gguf", b"x")], Kind::Usage, &["m.gguf", "file itself"]),
        (
            vec![("x.safetensors", &a), ("y.safetensors", &a)],
            Kind::Input,
            &["x.safetensors", "y.safetensors"],
        ),
        (vec![("model.safetensors", cut)], Kind::Input, &["model.safetensors", "\"a\"", "cut short"]),
        (vec![("model.safetensors", b"")], Kind::Input, &["model.safetensors", "empty"]),
        (vec![("model.safetensors", &a), ("config.json", b"[]")], Kind::Input, &["config.json", "no object"]),
        (
            vec![("model.safetensors", &a), ("config.json", b"{\n\"a\":}")],
            Kind::Input,
            &["config.json", "line 2, column 5"],
        ),
        (vec![("model.safetensors", &a), ("config.json", &bomb)], Kind::Input, &["config.json", "recursion"]),
        (vec![("model.safetensors", &a), (INDEX, &plain)], Kind::Input, &["both"]),
        (vec![(INDEX, &plain)], Kind::Input, &["s.safetensors", "missing", "\"a\""]),
        (vec![(INDEX, &up), ("s.safetensors", &a)], Kind::Input, &[INDEX, "\"a\"", "plain file name"]),
        (vec![(INDEX, &absolute)], Kind::Input, &[INDEX, "plain file name"]),
        (vec![(INDEX, &nested)], Kind::Input, &[INDEX, "plain file name"]),
        (vec![(INDEX, &back)], Kind::Input, &[INDEX, "plain file name"]),
        (vec![(INDEX, &dots)], Kind::Input, &[INDEX, "plain file name"]),
        (vec![(INDEX, &bin)], Kind::Input, &[INDEX, "s.bin", "no .safetensors"]),
        (
            vec![(INDEX, both), ("s.safetensors", &a)],
            Kind::Input,
            &["s.safetensors", "\"b\"", "not in this shard"],
        ),
        (
            vec![(INDEX, &plain), ("s.safetensors", &ab)],
            Kind::Input,
            &["s.safetensors", "\"b\"", "does not map it"],
        ),
        (
            vec![(INDEX, other), ("s.safetensors", &ab), ("t.safetensors", &a)],
            Kind::Input,
            &["s.safetensors", "\"b\"", "maps it to \"t.safetensors\""],
        ),
        (vec![(INDEX, &plain), ("s.safetensors", cut)], Kind::Input, &["s.safetensors", "\"a\""]),
        (vec![(INDEX, twice), ("s.safetensors", &a)], Kind::Input, &[INDEX, "\"a\" stands twice"]),
        (vec![(INDEX, b"{\"weight_map\":{}}")], Kind::Input, &[INDEX, "empty"]),
        (vec![(INDEX, b"{}")], Kind::Input, &[INDEX, "weight_map"]),
        (vec![(INDEX, b"{\"weight_map\":{},\"weight_map\":{}}")], Kind::Input, &[INDEX, "twice"]),
        (vec![(INDEX, b"")], Kind::Input, &[INDEX]),
        (vec![(INDEX, &bomb)], Kind::Input, &[INDEX, "line 1"]),
        (vec![(INDEX, &quiet_bomb)], Kind::Input, &[INDEX, "line 1"]),
        (vec![("model.safetensors", &ab), (INDEX, &single)], Kind::Input, &["\"b\"", "does not map it"]),
    ];
    for (i, (files, kind, words)) in cases.into_iter().enumerate() {
        let dir = folder(&files);
        refused(input::open(dir.path()), kind, words, &format!("case {i}: {words:?}"));
    }
    // What is not malformed: a single file under another name, and an index that maps to the single file.
    assert_eq!(input::open(folder(&[("x.safetensors", &a)]).path()).unwrap().tensors().len(), 1);
    let dir = folder(&[("model.safetensors", &a), (INDEX, &single)]);
    assert_eq!(input::open(dir.path()).unwrap().format(), "Hugging Face folder");
    let long = folder(&[("model.safetensors", &a)]);
    fs::File::create(long.path().join("merges.txt")).unwrap().set_len((64 << 20) + 1).unwrap();
    refused(input::open(long.path()), Kind::Input, &["merges.txt", "64 MiB"], "long sidecar");
}

#[cfg(unix)]
#[test]
fn shards_may_be_links_as_in_the_hubs_cache() {
    use std::os::unix::fs::symlink;
    let blobs = folder(&[("abc", &shard(&["a"])), ("def", b"{}")]);
    let dir = folder(&[(INDEX, br#"{"weight_map":{"a":"s.safetensors"}}"#)]);
    symlink(blobs.path().join("abc"), dir.path().join("s.safetensors")).unwrap();
    symlink(blobs.path().join("def"), dir.path().join("config.json")).unwrap();
    let model = input::open(dir.path()).unwrap();
    assert_eq!(model.tensors()[0].name, "a");
    assert!(model.config().is_some());
    symlink("nowhere", dir.path().join("tokenizer.json")).unwrap();
    refused(input::open(dir.path()), Kind::Io, &["tokenizer.json"], "broken link");
}

#[test]
fn open_knows_formats_by_their_contents() {
    let st = shard(&["a"]);
    let gg = gguf().tensor("w", &[2], 0, &[0; 8]).bytes();
    let dir = folder(&[
        ("a.safetensors", &st),
        ("b.data", &st),
        ("c.gguf", &gg),
        ("d.bin", &gg),
        ("e.json", b" {\"tensors\":[]}"),
        ("f.txt", b"{\"tensors\":[]}"),
        ("config.json", b"{}"),
    ]);
    for (name, format) in [
        ("a.safetensors", "safetensors"),
        ("b.data", "safetensors"),
        ("c.gguf", "GGUF"),
        ("d.bin", "GGUF"),
        ("e.json", "JSON bundle"),
        ("f.txt", "JSON bundle"),
    ] {
        let path = dir.path().join(name);
        let model = input::open(&path).unwrap();
        assert_eq!(model.format(), format, "{name}");
        assert_eq!(model.paths(), [path]);
        assert!(model.config().is_none());
        assert_eq!(model.sidecars().unwrap().len(), usize::from(format == "GGUF"));
    }
    let refusals: Vec<(&str, &[u8], Kind, &[&str])> = vec![
        ("x.tenpak", b"\x89TPK\r\n\x1a\n", Kind::Usage, &["already compressed", "decompress"]),
        ("x.pt", b"PK\x03\x04rest", Kind::Unsupported, &["pickle"]),
        ("x.model", b"PK\x03\x04rest", Kind::Unsupported, &["pickle"]),
        ("x.pkl", b"\x80\x02}q", Kind::Unsupported, &["pickle"]),
        ("x.bin", b"anything", Kind::Unsupported, &["pickle"]),
        ("x.npy", b"\x93NUMPY\x01", Kind::Unsupported, &["NumPy"]),
        ("x.npz", b"PK\x03\x04rest", Kind::Unsupported, &["NumPy"]),
        ("x.h5", b"\x89HDF\r\n", Kind::Unsupported, &["convert"]),
        ("y.safetensors", b"version https://git-lfs.github.com/spec/v1\n", Kind::Input, &["git lfs pull"]),
        ("y.gguf", b"else", Kind::Input, &["GGUF"]),
        ("y.txt", b"hello", Kind::Input, &["not a model"]),
        ("y.json", b"hello", Kind::Input, &["line 1, column 1"]),
        ("y.toml", b"[package]", Kind::Input, &["not a model"]),
        ("tokenizer.json", b"{\"version\":\"1.0\"}", Kind::Usage, &["give its folder"]),
        ("y.safetensors.index.json", b"{}", Kind::Usage, &["give its folder"]),
        ("empty.json", b"", Kind::Input, &["empty"]),
        ("empty", b"", Kind::Input, &["empty"]),
    ];
    for (name, bytes, kind, words) in refusals {
        let path = dir.path().join(name);
        fs::write(&path, bytes).unwrap();
        refused(input::open(&path), kind, &[&[name], words].concat(), name);
    }
    refused(input::open(&dir.path().join("missing")), Kind::Io, &["missing"], "missing");
    #[cfg(unix)]
    refused(input::open(Path::new("/dev/null")), Kind::Usage, &["not a regular file"], "device");
}

#[cfg(unix)]
#[test]
fn an_unreadable_file_is_one_sentence() {
    use std::os::unix::fs::PermissionsExt;
    let dir = folder(&[("a.json", b"{}")]);
    let path = dir.path().join("a.json");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o000)).unwrap();
    // The superuser reads it all the same.
    if fs::read(&path).is_err() {
        refused(input::open(&path), Kind::Io, &["a.json", "ermission"], "unreadable");
    } else {
        assert!(input::open(&path).is_err());
    }
}

#[test]
fn the_models_of_the_repository_and_the_reference_open() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let reference =
        std::env::var_os("TENPAK_REFERENCE").map_or_else(|| root.join("../shared"), PathBuf::from);
    let models = ["gpt2-books", "llama-books"].map(|name| reference.join("models").join(name));
    let ours = ["tiny-llama", "tiny-gpt2"].map(|name| root.join("tests/data").join(name));
    for folder in ours.iter().chain(models.iter().filter(|m| m.exists())) {
        let model = input::open(folder).unwrap();
        let lone = input::open(&folder.join("model.safetensors")).unwrap();
        assert_eq!(model.tensors(), lone.tensors());
        assert!(model.config().unwrap()["model_type"].is_string() && lone.config().is_none());
        let sidecars: Vec<String> = model.sidecars().unwrap().into_iter().map(|s| s.path).collect();
        assert_eq!(sidecars, ["config.json", "tokenizer.json"], "{}", folder.display());
        for i in 0..model.tensors().len() {
            let values = widened(&*model, i);
            assert!(values.iter().all(|v| v.is_finite()) && values.iter().any(|v| *v != 0.0));
        }
    }
}

proptest! {
    #[test]
    fn whatever_the_bytes_a_reader_answers(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        let _ = Safetensors::from_bytes("m", bytes.clone());
        let _ = Bundle::from_bytes("m", bytes.clone());
        let _ = Gguf::from_bytes("m", [b"GGUF\x03\0\0\0".to_vec(), bytes].concat());
    }

    #[test]
    fn numbers_are_rounded_once(bits in 0u32..0x7f7f_ffff) {
        let (below, above) = (f32::from_bits(bits), f32::from_bits(bits + 1));
        // All digits of the number half way between, and one more: nearer to `above`, though a double
        // cannot tell.
        let half_way = f64::midpoint(f64::from(below), f64::from(above));
        let text = format!("{half_way:.200e}").replace('e', "1e");
        let json = format!(r#"{{"tensors":{{"w":{{"shape":[2],"data":[{text},-{text}]}}}}}}"#);
        let model = Bundle::from_bytes("m", json.into_bytes()).unwrap();
        prop_assert_eq!(widened(&model, 0), [above, -above]);
    }
}
