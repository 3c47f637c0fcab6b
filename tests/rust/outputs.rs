//! Every output: what is written is read back to the last bit, and a model that fails leaves nothing behind.

use half::{bf16, f16};
use proptest::prelude::*;
use std::fs;
use std::path::Path;
use tenpak::input::{self, Model, Sidecar};
use tenpak::output::{self, Format, Item, Options};
use tenpak::tensor::Dtype;
use tenpak::{Kind, Result};

fn item(name: &str, dtype: Dtype, shape: &[usize]) -> Item {
    Item { name: name.to_string(), dtype, shape: shape.to_vec() }
}

fn bytes_of(item: &Item, seed: usize) -> Vec<u8> {
    let len = item.shape.iter().product::<usize>() * item.dtype.size();
    // Top bits clear: finite in every float format here.
    (0..len).map(|i| ((i * 31 + seed * 7) % 60) as u8).collect()
}

fn write_all(
    format: Format,
    path: &Path,
    items: &[Item],
    data: &[Vec<u8>],
    sidecars: &[Sidecar],
    options: &Options,
) -> Result<()> {
    let mut writer = output::create(format, path, items, sidecars, options)?;
    for bytes in data {
        writer.write(bytes)?;
    }
    writer.finish()
}

fn same(model: &dyn Model, items: &[Item], data: &[Vec<u8>]) {
    assert_eq!(model.tensors().len(), items.len());
    for (item, bytes) in items.iter().zip(data) {
        let i = model.tensors().iter().position(|t| t.name == item.name).unwrap();
        let tensor = model.read(i).unwrap();
        assert_eq!((&tensor.shape, tensor.encoding.dtype()), (&item.shape, item.dtype), "{}", item.name);
        assert!(*tensor.bytes == bytes[..], "{}", item.name);
    }
}

fn refused(result: Result<()>, kind: Kind, words: &[&str]) {
    let error = result.expect_err(&format!("accepted: {words:?}"));
    let message = error.to_string();
    assert_eq!(error.kind(), kind, "{message}");
    assert!(!message.contains('\n'), "{message}");
    for word in words {
        assert!(message.contains(word), "{word:?} is not in: {message}");
    }
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn sidecar(path: &str, text: &str) -> Sidecar {
    Sidecar { path: path.to_string(), bytes: text.as_bytes().to_vec() }
}

fn example() -> (Vec<Item>, Vec<Vec<u8>>) {
    let items = vec![
        item("b", Dtype::F32, &[2, 3]),
        item("a \"x\"", Dtype::F16, &[5]),
        item("ü", Dtype::BF16, &[]),
        item("none", Dtype::F32, &[0, 3]),
    ];
    let data = items.iter().enumerate().map(|(i, item)| bytes_of(item, i)).collect();
    (items, data)
}

fn force() -> Options {
    Options { force: true, ..Options::default() }
}

#[test]
fn the_path_decides_the_format() {
    for (path, format) in [
        ("m.json", Format::Bundle),
        ("M.JSON", Format::Bundle),
        ("x/m.safetensors", Format::Safetensors),
        ("m", Format::Folder),
        ("m.v1", Format::Folder),
        ("m.json/", Format::Folder),
    ] {
        assert_eq!(Format::of(Path::new(path)), format, "{path}");
    }
    for format in Format::ALL {
        assert_eq!(Format::from_name(format.name()).unwrap(), format);
    }
    assert_eq!(Format::from_name("onnx").unwrap_err().kind(), Kind::Usage);
}

#[test]
fn safetensors_are_written_byte_for_byte_as_specified() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.safetensors");
    let (items, data) = example();
    write_all(Format::Safetensors, &path, &items, &data, &[], &Options::default()).unwrap();
    let header = concat!(
        r#"{"__metadata__":{"format":"pt"},"b":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},"#,
        r#""a \"x\"":{"dtype":"F16","shape":[5],"data_offsets":[24,34]},"#,
        r#""ü":{"dtype":"BF16","shape":[],"data_offsets":[34,36]},"#,
        r#""none":{"dtype":"F32","shape":[0,3],"data_offsets":[36,36]}}"#
    );
    let written = fs::read(&path).unwrap();
    let len = header.len().next_multiple_of(8);
    assert_eq!(written[..8], (len as u64).to_le_bytes());
    assert_eq!(std::str::from_utf8(&written[8..8 + len]).unwrap(), format!("{header:<0$}", len - 1));
    assert_eq!(written[8 + len..], data.concat());
    same(&*input::open(&path).unwrap(), &items, &data);
    assert_eq!(names(folder.path()), ["m.safetensors"]);
}

#[test]
fn a_bundle_is_readable_and_exact() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.json");
    let items = [item("w", Dtype::F32, &[2, 4]), item("h", Dtype::F16, &[2]), item("b", Dtype::BF16, &[1])];
    let w = [0.1f32, -0.0, 3.0, 1e-45, f32::MAX, 16_777_216.0, -2.5e-7, 1e20];
    let data = [
        w.iter().flat_map(|x| x.to_le_bytes()).collect(),
        [f16::from_f32(0.1), f16::MAX].iter().flat_map(|x| x.to_le_bytes()).collect(),
        bf16::from_f32(-1.5).to_le_bytes().to_vec(),
    ];
    write_all(Format::Bundle, &path, &items, &data, &[sidecar("config.json", "{}")], &Options::default())
        .unwrap();
    assert_eq!(
        fs::read_to_string(&path).unwrap(),
        "{\"format\":\"tenpak-bundle\",\"version\":1,\"tensors\":[\n\
         {\"name\":\"w\",\"shape\":[2,4],\"dtype\":\"f32\",\"data\":[0.1,-0.0,3,1e-45,3.4028235e+38,16777216,-2.5e-7,1e+20]},\n\
         {\"name\":\"h\",\"shape\":[2],\"dtype\":\"f16\",\"data\":[0.099975586,65504]},\n\
         {\"name\":\"b\",\"shape\":[1],\"dtype\":\"bf16\",\"data\":[-1.5]}\n]}\n"
    );
    same(&*input::open(&path).unwrap(), &items, &data);
    let none = folder.path().join("none.json");
    write_all(Format::Bundle, &none, &[], &[], &[], &Options::default()).unwrap();
    assert_eq!(input::open(&none).unwrap().tensors().len(), 0);
}

#[test]
fn what_a_bundle_cannot_hold_is_refused_and_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.json");
    for dtype in Dtype::ALL.iter().filter(|d| !d.is_weight()) {
        let items = [item("w", Dtype::F32, &[1]), item("ids", *dtype, &[2])];
        let result = output::create(Format::Bundle, &path, &items, &[], &Options::default()).map(drop);
        refused(result, Kind::Unsupported, &["m.json", "\"ids\"", dtype.name(), "safetensors"]);
    }
    for (dtype, bytes) in [
        (Dtype::F32, f32::NAN.to_le_bytes().to_vec()),
        (Dtype::F16, f16::INFINITY.to_le_bytes().to_vec()),
        (Dtype::BF16, bf16::NEG_INFINITY.to_le_bytes().to_vec()),
    ] {
        let items = [item("w", dtype, &[2])];
        let data = [[vec![0; dtype.size()], bytes].concat()];
        let result = write_all(Format::Bundle, &path, &items, &data, &[], &Options::default());
        refused(result, Kind::Input, &["m.json", "\"w\"", "element 1"]);
    }
    let vast = [item("w", Dtype::F32, &[1 << 30])];
    let result = output::create(Format::Bundle, &path, &vast, &[], &Options::default()).map(drop);
    refused(result, Kind::Usage, &["1024 MiB", "safetensors"]);
    assert!(names(folder.path()).is_empty());
}

#[test]
fn wrong_calls_are_usage_errors_and_leave_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let (items, data) = example();
    for format in Format::ALL {
        let path = folder.path().join(format!("m.{}", format.name()));
        let create = || output::create(format, &path, &items, &[], &Options::default()).unwrap();
        refused(create().write(&[0; 3]), Kind::Usage, &["3 bytes", "\"b\"", "24"]);
        refused(create().finish(), Kind::Usage, &["\"b\"", "3 more"]);
        let mut writer = create();
        data.iter().for_each(|d| writer.write(d).unwrap());
        refused(writer.write(&[]), Kind::Usage, &["all 4 tensors"]);
        drop(writer);
        let twice = [items[0].clone(), items[0].clone()];
        let result = output::create(format, &path, &twice, &[], &Options::default()).map(drop);
        refused(result, Kind::Usage, &["\"b\" stands twice"]);
        let huge = [item("w", Dtype::F32, &[usize::MAX, 2])];
        let result = output::create(format, &path, &huge, &[], &Options::default()).map(drop);
        refused(result, Kind::Usage, &["w", "2^56"]);
        let nowhere = folder.path().join("missing").join(path.file_name().unwrap());
        let result = output::create(format, &nowhere, &items, &[], &Options::default()).map(drop);
        refused(result, Kind::Io, &["missing", "does not exist"]);
        assert!(names(folder.path()).is_empty(), "{format:?}: {:?}", names(folder.path()));
    }
}

#[test]
fn a_model_that_no_disk_holds_is_refused_before_any_work() {
    let folder = tempfile::tempdir().unwrap();
    let items: Vec<Item> = (0..1 << 10).map(|i| item(&format!("t{i}"), Dtype::F32, &[1 << 40])).collect();
    for format in [Format::Safetensors, Format::Folder] {
        let path = folder.path().join(format.name());
        let options = Options { shard_bytes: 1, ..Options::default() };
        let result = output::create(format, &path, &items, &[], &options).map(drop);
        if cfg!(unix) {
            refused(result, Kind::Io, &[format.name(), "MB are free"]);
        }
    }
    assert!(names(folder.path()).is_empty());
}

#[test]
fn an_existing_file_needs_force_and_outlives_a_failure() {
    let folder = tempfile::tempdir().unwrap();
    let (items, data) = example();
    for format in [Format::Bundle, Format::Safetensors] {
        let path = folder.path().join(format.name());
        fs::write(&path, "old").unwrap();
        let result = write_all(format, &path, &items, &data, &[], &Options::default());
        refused(result, Kind::Usage, &["already exists", "--force"]);
        let mut writer = output::create(format, &path, &items, &[], &force()).unwrap();
        writer.write(&data[0]).unwrap();
        drop(writer);
        assert_eq!(fs::read_to_string(&path).unwrap(), "old");
        write_all(format, &path, &items, &data, &[], &force()).unwrap();
        same(&*input::open(&path).unwrap(), &items, &data);
    }
    assert_eq!(names(folder.path()), ["json", "safetensors"]);
}

#[test]
fn tensors_start_where_readers_can_view_them() {
    let folder = tempfile::tempdir().unwrap();
    let items = [
        item("flag", Dtype::BOOL, &[3]),
        item("h", Dtype::F16, &[5]),
        item("w", Dtype::F32, &[4, 2]),
        item("x", Dtype::F32, &[3]),
        item("i", Dtype::I64, &[2]),
    ];
    let data: Vec<_> = items.iter().enumerate().map(|(i, item)| bytes_of(item, i)).collect();
    let path = folder.path().join("m.safetensors");
    write_all(Format::Safetensors, &path, &items, &data, &[], &Options::default()).unwrap();
    let model = input::open(&path).unwrap();
    same(&*model, &items, &data);
    let order: Vec<&str> = model.tensors().iter().map(|t| t.name.as_str()).collect();
    assert_eq!(order, ["w", "i", "x", "h", "flag"]);
}

#[test]
fn a_small_model_is_one_file_in_a_folder_with_its_sidecars() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model");
    let (items, data) = example();
    let sidecars = [sidecar("config.json", "{}"), sidecar("sub/x.txt", "x")];
    write_all(Format::Folder, &path, &items, &data, &sidecars, &Options::default()).unwrap();
    assert_eq!(names(&path), ["config.json", "model.safetensors", "sub"]);
    assert_eq!(fs::read_to_string(path.join("sub/x.txt")).unwrap(), "x");
    let model = input::open(&path).unwrap();
    same(&*model, &items, &data);
    assert!(model.config().is_some());
    assert_eq!(names(folder.path()), ["model"]);
    let empty = folder.path().join("empty");
    write_all(Format::Folder, &empty, &[], &[], &[], &Options::default()).unwrap();
    assert_eq!(input::open(&empty).unwrap().tensors().len(), 0);
}

#[test]
fn a_large_model_is_sharded() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model");
    let items: Vec<Item> = (0..5).map(|i| item(&format!("t{i}"), Dtype::F32, &[10 + i])).collect();
    let data: Vec<_> = items.iter().enumerate().map(|(i, item)| bytes_of(item, i)).collect();
    // 40, 44, 48, 52, 56 bytes: two, one of 48 would be too many for the first.
    let options = Options { shard_bytes: 100, ..Options::default() };
    write_all(Format::Folder, &path, &items, &data, &[], &options).unwrap();
    assert_eq!(
        names(&path),
        [
            "model-00001-of-00003.safetensors",
            "model-00002-of-00003.safetensors",
            "model-00003-of-00003.safetensors",
            "model.safetensors.index.json",
        ]
    );
    let index: serde_json::Value =
        serde_json::from_slice(&fs::read(path.join("model.safetensors.index.json")).unwrap()).unwrap();
    assert_eq!(index["metadata"]["total_size"], 240);
    assert_eq!(index["weight_map"]["t1"], "model-00001-of-00003.safetensors");
    assert_eq!(index["weight_map"]["t3"], "model-00002-of-00003.safetensors");
    let model = input::open(&path).unwrap();
    same(&*model, &items, &data);
    assert_eq!(model.format(), "Hugging Face folder, sharded");
    // A tensor beyond the limit has a file of its own.
    let each = folder.path().join("each");
    write_all(Format::Folder, &each, &items, &data, &[], &Options { shard_bytes: 1, ..Options::default() })
        .unwrap();
    assert_eq!(names(&each).len(), 6);
    same(&*input::open(&each).unwrap(), &items, &data);
}

#[test]
fn a_folder_is_replaced_only_on_request_and_only_if_it_is_a_models() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model");
    let (items, data) = example();
    let write = |options: &Options| write_all(Format::Folder, &path, &items, &data, &[], options);
    fs::create_dir(&path).unwrap();
    write(&Options::default()).expect("an empty folder is no obstacle");
    refused(write(&Options::default()), Kind::Usage, &["model", "--force"]);
    fs::write(path.join("stale.txt"), "old").unwrap();
    let mut writer = output::create(Format::Folder, &path, &items, &[], &force()).unwrap();
    writer.write(&data[0]).unwrap();
    drop(writer);
    assert_eq!(names(&path), ["model.safetensors", "stale.txt"]);
    write(&force()).unwrap();
    assert_eq!(names(&path), ["model.safetensors"]);

    fs::create_dir(path.join("precious")).unwrap();
    refused(write(&force()), Kind::Usage, &["precious", "regular file"]);
    fs::remove_dir(path.join("precious")).unwrap();
    fs::rename(path.join("model.safetensors"), path.join("thesis.txt")).unwrap();
    refused(write(&force()), Kind::Usage, &["no .safetensors"]);
    fs::remove_dir_all(&path).unwrap();
    fs::write(&path, "a file").unwrap();
    refused(write(&force()), Kind::Usage, &["no folder"]);
    refused(write_all(Format::Folder, Path::new("/"), &items, &data, &[], &force()), Kind::Usage, &["name"]);
    assert_eq!(names(folder.path()), ["model"]);
}

#[test]
fn what_appears_in_the_target_meanwhile_is_not_lost() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model");
    let (items, data) = example();
    let mut writer = output::create(Format::Folder, &path, &items, &[], &Options::default()).unwrap();
    data.iter().for_each(|d| writer.write(d).unwrap());
    fs::create_dir(&path).unwrap();
    fs::write(path.join("new.txt"), "theirs").unwrap();
    refused(writer.finish(), Kind::Usage, &["already exists"]);
    assert_eq!(names(&path), ["new.txt"]);
    assert_eq!(names(folder.path()), ["model"]);
}

#[cfg(unix)]
#[test]
fn links_are_followed_to_the_target_and_never_replaced_inside_it() {
    use std::os::unix::fs::symlink;
    let folder = tempfile::tempdir().unwrap();
    let (items, data) = example();
    let (real, link) = (folder.path().join("real"), folder.path().join("link"));
    write_all(Format::Folder, &real, &items, &data, &[], &Options::default()).unwrap();
    symlink(&real, &link).unwrap();
    fs::write(real.join("stale.txt"), "old").unwrap();
    write_all(Format::Folder, &link, &items, &data, &[], &force()).unwrap();
    assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
    assert_eq!(names(&real), ["model.safetensors"]);
    symlink("/etc/hostname", real.join("l")).unwrap();
    refused(write_all(Format::Folder, &real, &items, &data, &[], &force()), Kind::Usage, &["regular file"]);
}

#[test]
fn sidecars_stay_inside_the_folder() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model");
    let (items, _) = example();
    let long = "x".repeat(1025);
    let paths = [
        "../x",
        "/etc/x",
        "a/../x",
        "a//x",
        "",
        ".",
        "./x",
        "a/",
        "C:x",
        "a\\x",
        "a\nb",
        "model.safetensors",
        "MODEL.safetensors",
        "model.safetensors.index.json",
        &long,
    ];
    for bad in paths {
        let result = output::create(Format::Folder, &path, &items, &[sidecar(bad, "x")], &Options::default());
        refused(result.map(drop), Kind::Input, &["model", "embedded file"]);
    }
    let twice = [sidecar("a.json", ""), sidecar("A.json", "")];
    let result = output::create(Format::Folder, &path, &items, &twice, &Options::default()).map(drop);
    refused(result, Kind::Input, &["same path"]);
    assert!(names(folder.path()).is_empty());
}

fn any_weight() -> impl Strategy<Value = (Dtype, Vec<usize>, Vec<u32>)> {
    let dtype = prop_oneof![Just(Dtype::F32), Just(Dtype::F16), Just(Dtype::BF16)];
    let shape = proptest::collection::vec(0usize..5, 0..4);
    (dtype, shape).prop_flat_map(|(dtype, shape)| {
        let n = shape.iter().product::<usize>();
        (Just(dtype), Just(shape), proptest::collection::vec(any::<u32>(), n))
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn bundles_give_every_finite_weight_back(tensors in proptest::collection::vec(any_weight(), 0..4)) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m.json");
        let mut items = Vec::new();
        let mut data = Vec::new();
        for (i, (dtype, shape, bits)) in tensors.iter().enumerate() {
            items.push(item(&format!("t{i}"), *dtype, shape));
            // An exponent of all ones would not be finite: clear its lowest bit.
            data.push(bits.iter().flat_map(|&b| match dtype {
                Dtype::F32 => (b & !(1 << 23)).to_le_bytes().to_vec(),
                Dtype::F16 => (b as u16 & !(1 << 10)).to_le_bytes().to_vec(),
                _ => (b as u16 & !(1 << 7)).to_le_bytes().to_vec(),
            }).collect::<Vec<u8>>());
        }
        write_all(Format::Bundle, &path, &items, &data, &[], &Options::default()).unwrap();
        same(&*input::open(&path).unwrap(), &items, &data);
    }

    #[test]
    fn safetensors_and_folders_give_every_byte_back(
        tensors in proptest::collection::vec((0..Dtype::ALL.len(), proptest::collection::vec(0usize..6, 0..4)), 0..8),
        shard_bytes in 1u64..500,
    ) {
        let folder = tempfile::tempdir().unwrap();
        let items: Vec<Item> =
            tensors.iter().enumerate().map(|(i, (d, shape))| item(&format!("t{i}"), Dtype::ALL[*d], shape)).collect();
        let data: Vec<_> = items.iter().enumerate().map(|(i, item)| bytes_of(item, i)).collect();
        let options = Options { shard_bytes, ..Options::default() };
        for format in [Format::Safetensors, Format::Folder] {
            let path = folder.path().join(format.name());
            write_all(format, &path, &items, &data, &[], &options).unwrap();
            let model = input::open(&path).unwrap();
            same(&*model, &items, &data);
            if format == Format::Safetensors {
                let mut offset = 0;
                for (i, info) in model.tensors().iter().enumerate() {
                    prop_assert_eq!(offset % info.encoding.dtype().size(), 0);
                    offset += model.read(i).unwrap().bytes.len();
                }
                let first = fs::read(&path).unwrap();
                write_all(format, &path, &items, &data, &[], &force()).unwrap();
                prop_assert_eq!(first, fs::read(&path).unwrap());
            }
        }
    }
}
