//! The Hugging Face folder: one `model.safetensors` or an index with shards, and the small files beside them.

use super::check::{json_error, line_column, quoted};
use super::source::{read_capped, too_long};
use super::{Model, Safetensors, Sidecar, TensorInfo, pickle};
use crate::error::{Error, Kind, Result};
use crate::tensor::Tensor;
use serde::de::{self, Deserialize, Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const CONFIG: &str = "config.json";

/// The longest shard index.
const MAX_INDEX: u64 = 100 << 20;

/// The longest sidecar.
const MAX_SIDECAR: u64 = 64 << 20;

/// The files that travel with the weights, beside licences: what transformers needs to load the model.
const SIDECARS: &[&str] = &[
    CONFIG,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
];

/// What licence files' names start with, in any case; their terms ask that they travel with the weights.
const LICENCES: &[&str] = &["license", "licence", "notice", "use_policy"];

/// An open Hugging Face folder.
pub struct Folder {
    index: Option<PathBuf>,
    shards: Vec<Safetensors>,
    tensors: Vec<TensorInfo>,
    /// For each tensor its shard, and its place in it.
    places: Vec<(usize, usize)>,
    sidecars: Vec<(String, PathBuf)>,
    config: Option<Value>,
}

impl Folder {
    /// Opens and validates a folder: its index, every shard's header, its config.
    ///
    /// # Errors
    /// An input error that names the file and the tensor; an I/O error; an unsupported one for pickles.
    pub fn open(folder: &Path) -> Result<Self> {
        let names = file_names(folder)?;
        let sidecars = find_sidecars(folder, &names)?;
        let config = match sidecars.iter().find(|(name, _)| name == CONFIG) {
            Some((_, path)) => Some(read_config(path)?),
            None => None,
        };
        let (index, shards) = match weight_files(folder, &names)? {
            Weights::One(path) => (None, vec![Safetensors::open(&path)?]),
            Weights::Sharded(index, map) => {
                let shards = open_shards(folder, &index, &map)?;
                (Some(index), shards)
            }
        };
        let mut tensors = Vec::new();
        let mut places = Vec::new();
        for (s, shard) in shards.iter().enumerate() {
            for (i, info) in shard.tensors().iter().enumerate() {
                tensors.push(info.clone());
                places.push((s, i));
            }
        }
        Ok(Folder { index, shards, tensors, places, sidecars, config })
    }
}

impl Model for Folder {
    fn format(&self) -> &'static str {
        if self.shards.len() > 1 { "Hugging Face folder, sharded" } else { "Hugging Face folder" }
    }

    fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    fn read(&self, index: usize) -> Result<Tensor<'_>> {
        let (shard, place) = self.places[index];
        self.shards[shard].read(place)
    }

    fn sidecars(&self) -> Result<Vec<Sidecar>> {
        let read = |(name, path): &(String, PathBuf)| {
            Ok(Sidecar { path: name.clone(), bytes: read_capped(path, MAX_SIDECAR)? })
        };
        self.sidecars.iter().map(read).collect()
    }

    fn config(&self) -> Option<&Value> {
        self.config.as_ref()
    }

    fn paths(&self) -> Vec<PathBuf> {
        let shards = self.shards.iter().map(|s| s.path().to_path_buf());
        self.index.iter().cloned().chain(shards).chain(self.sidecars.iter().map(|(_, p)| p.clone())).collect()
    }
}

/// Whether that is the name of a file beside the weights.
pub(super) fn is_sidecar(path: &Path) -> bool {
    path.file_name().is_some_and(|name| SIDECARS.iter().any(|known| name == *known))
}

/// Name to shard, as the index has it.
type WeightMap = BTreeMap<String, String>;

enum Weights {
    One(PathBuf),
    Sharded(PathBuf, WeightMap),
}

/// The names of the files in a folder, in order; names that are no UTF-8 cannot be ours.
fn file_names(folder: &Path) -> Result<BTreeSet<String>> {
    let unreadable = |e: &std::io::Error| Error::io("cannot read the folder", folder, e);
    let mut names = BTreeSet::new();
    for entry in fs::read_dir(folder).map_err(|e| unreadable(&e))? {
        let entry = entry.map_err(|e| unreadable(&e))?;
        // Follows symbolic links: the hub's cache is made of them. Broken ones are kept, to be reported.
        let is_file = fs::metadata(entry.path()).map_or(true, |meta| meta.is_file());
        if let Ok(name) = entry.file_name().into_string()
            && is_file
        {
            names.insert(name);
        }
    }
    Ok(names)
}

/// Which files hold the weights.
fn weight_files(folder: &Path, names: &BTreeSet<String>) -> Result<Weights> {
    let shown = folder.display();
    if names.contains(INDEX) {
        let path = folder.join(INDEX);
        let map = read_index(&path)?;
        // An index may map everything to the single file; one that maps elsewhere leaves it open which of
        // the two is the model.
        if names.contains(SINGLE) && map.values().all(|shard| shard != SINGLE) {
            return Err(Error::input(format!(
                "{shown}: holds both {SINGLE} and {INDEX} with other shards; remove the one that is not the model"
            )));
        }
        return Ok(Weights::Sharded(path, map));
    }
    if names.contains(SINGLE) {
        return Ok(Weights::One(folder.join(SINGLE)));
    }
    let ending = |end: &str| names.iter().filter(|n| n.ends_with(end)).collect::<Vec<_>>();
    match ending(".safetensors")[..] {
        [one] => return Ok(Weights::One(folder.join(one))),
        [] => {}
        [first, second, ..] => {
            return Err(Error::input(format!(
                "{shown}: holds {first}, {second} and no {INDEX} that says which belong to the model; give one file, or add the index"
            )));
        }
    }
    for end in [".bin", ".bin.index.json", ".pt", ".pth", ".ckpt"] {
        if let [name, ..] = ending(end)[..] {
            return Err(pickle(&folder.join(name)));
        }
    }
    if let [name, ..] = ending(".gguf")[..] {
        return Err(Error::usage(format!(
            "{shown}: no {SINGLE} in this folder; for {name} give the file itself"
        )));
    }
    Err(Error::input(format!("{shown}: no model in this folder; neither {SINGLE} nor {INDEX} is there")))
}

fn read_index(path: &Path) -> Result<WeightMap> {
    let text = read_capped(path, MAX_INDEX)?;
    let Index(map) = serde_json::from_slice(&text).map_err(|e| json_place(path, &text, &e))?;
    for (tensor, shard) in &map {
        let plain = !shard.is_empty()
            && shard != "."
            && shard != ".."
            && !shard.chars().any(|c| matches!(c, '/' | '\\' | ':') || c.is_control());
        if !plain {
            return Err(Error::input(format!(
                "{}: tensor {} is mapped to {}; a shard must be a plain file name in the same folder",
                path.display(),
                quoted(tensor),
                quoted(shard)
            )));
        }
        if !shard.ends_with(".safetensors") {
            return Err(Error::input(format!(
                "{}: tensor {} is mapped to {}, which is no .safetensors file",
                path.display(),
                quoted(tensor),
                quoted(shard)
            )));
        }
    }
    if map.is_empty() {
        return Err(Error::input(format!("{}: the weight_map is empty", path.display())));
    }
    Ok(map)
}

/// Opens every shard, in the order of names, and sees that index and shards agree on every tensor.
fn open_shards(folder: &Path, index: &Path, map: &WeightMap) -> Result<Vec<Safetensors>> {
    let index = index.display();
    let mut by_shard: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (tensor, shard) in map {
        by_shard.entry(shard).or_default().push(tensor);
    }
    let mut shards = Vec::with_capacity(by_shard.len());
    for (name, mapped) in by_shard {
        let path = folder.join(name);
        if !path.exists() {
            return Err(Error::new(
                Kind::Input,
                format!(
                    "{}: the shard is missing; {index} maps tensor {} to it",
                    path.display(),
                    quoted(mapped[0])
                ),
            ));
        }
        let shard = Safetensors::open(&path)?;
        for info in shard.tensors() {
            match map.get(&info.name) {
                Some(home) if home == name => {}
                home => {
                    let says = match home {
                        Some(other) => format!("maps it to {}", quoted(other)),
                        None => "does not map it".to_string(),
                    };
                    return Err(Error::input(format!(
                        "{}: holds tensor {}, but {index} {says}",
                        path.display(),
                        quoted(&info.name)
                    )));
                }
            }
        }
        let held: HashMap<&str, ()> = shard.tensors().iter().map(|t| (t.name.as_str(), ())).collect();
        if let Some(missing) = mapped.iter().find(|t| !held.contains_key(**t)) {
            return Err(Error::input(format!(
                "{}: tensor {} is not in this shard, but {index} maps it there",
                path.display(),
                quoted(missing)
            )));
        }
        shards.push(shard);
    }
    Ok(shards)
}

/// The sidecars that are there, in a fixed order, each short enough.
fn find_sidecars(folder: &Path, names: &BTreeSet<String>) -> Result<Vec<(String, PathBuf)>> {
    let is_licence = |name: &str| {
        let lower = name.to_lowercase();
        let plain = !name.chars().any(|c| matches!(c, '\\' | ':') || c.is_control());
        plain && name.len() <= 255 && LICENCES.iter().any(|start| lower.starts_with(start))
    };
    let known = SIDECARS.iter().copied().filter(|name| names.contains(*name));
    let licences = names.iter().map(String::as_str).filter(|name| is_licence(name));
    let mut found = Vec::new();
    for name in known.chain(licences) {
        let path = folder.join(name);
        let meta = fs::metadata(&path).map_err(|e| Error::io("cannot open", &path, &e))?;
        if meta.len() > MAX_SIDECAR {
            return Err(too_long(&path, MAX_SIDECAR));
        }
        found.push((name.to_string(), path));
    }
    Ok(found)
}

fn read_config(path: &Path) -> Result<Value> {
    let text = read_capped(path, MAX_SIDECAR)?;
    let config: Value = serde_json::from_slice(&text).map_err(|e| json_place(path, &text, &e))?;
    if !config.is_object() {
        return Err(Error::input(format!("{}: holds JSON, but no object", path.display())));
    }
    Ok(config)
}

fn json_place(path: &Path, text: &[u8], error: &serde_json::Error) -> Error {
    let (offset, message) = json_error(text, error);
    let (line, column) = line_column(text, offset);
    Error::input(format!("{}: line {line}, column {column}: {message}", path.display()))
}

struct Index(WeightMap);

impl<'de> Deserialize<'de> for Index {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(IndexVisitor)
    }
}

struct IndexVisitor;

impl<'de> Visitor<'de> for IndexVisitor {
    type Value = Index;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object with weight_map")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Index, A::Error> {
        let mut weights = None;
        while let Some(key) = map.next_key::<String>()? {
            if key == "weight_map" {
                if weights.replace(map.next_value::<Mapped>()?.0).is_some() {
                    return Err(de::Error::custom("the key \"weight_map\" stands twice"));
                }
            } else {
                // `metadata`, and whatever else tools note down: nothing depends on it.
                map.next_value::<IgnoredAny>()?;
            }
        }
        weights.map(Index).ok_or_else(|| de::Error::missing_field("weight_map"))
    }
}

struct Mapped(WeightMap);

impl<'de> Deserialize<'de> for Mapped {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(MappedVisitor)
    }
}

struct MappedVisitor;

impl<'de> Visitor<'de> for MappedVisitor {
    type Value = Mapped;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object that maps each tensor to its shard")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Mapped, A::Error> {
        let mut weights = WeightMap::new();
        while let Some((tensor, shard)) = map.next_entry::<String, String>()? {
            if weights.contains_key(&tensor) {
                return Err(de::Error::custom(format_args!("tensor {} stands twice", quoted(&tensor))));
            }
            weights.insert(tensor, shard);
        }
        Ok(Mapped(weights))
    }
}
