//! The Hugging Face folder output: filled beside the target under another name, then put in its place in one step.

use super::{Fill, Item, ModelWriter, Options, Progress, safetensors};
use crate::atomic::{AtomicFile, check_space, temporary_name};
use crate::error::{Error, Kind, Result};
use crate::input::Sidecar;
use serde_json::json;
use std::collections::{BTreeMap, HashSet};
use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// Tells apart the temporary folders of one process.
static NUMBER: AtomicU64 = AtomicU64::new(0);

/// A folder under construction.
pub(super) struct Writer {
    staging: Staging,
    progress: Progress,
    /// The items of each shard, and its name.
    shards: Vec<(Range<usize>, String)>,
    /// The shard that is being written, and its number.
    open: Option<(usize, safetensors::Writer)>,
}

impl Writer {
    pub fn create(path: &Path, items: &[Item], sidecars: &[Sidecar], options: &Options) -> Result<Self> {
        let shards = shards(items, options.shard_bytes)?;
        check_paths(sidecars, &shards).map_err(|e| e.at(path.display()))?;
        let mut needed = sidecars.iter().map(|s| s.bytes.len() as u64).sum::<u64>();
        for item in items {
            needed = needed.saturating_add(item.byte_len()?);
        }
        let staging = Staging::create(path, options.force)?;
        check_space(&staging.path, path, needed)?;
        for sidecar in sidecars {
            let mut file = staging.file(&sidecar.path, sidecar.bytes.len() as u64)?;
            file.put(&sidecar.bytes)?;
            file.commit()?;
        }
        if shards.len() > 1 {
            let index = index(items, &shards)?;
            let mut file = staging.file(INDEX, index.len() as u64)?;
            file.put(&index)?;
            file.commit()?;
        }
        let mut writer = Writer { staging, progress: Progress::new(items), shards, open: None };
        writer.next_shard(0)?;
        Ok(writer)
    }

    fn next_shard(&mut self, number: usize) -> Result<()> {
        if let Some((range, name)) = self.shards.get(number) {
            let items = &self.progress.items[range.clone()];
            let shard = safetensors::Writer::create(items, |bytes| self.staging.file(name, bytes))?;
            self.open = Some((number, shard));
        }
        Ok(())
    }
}

impl ModelWriter for Writer {
    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let index = self.progress.take(bytes)?;
        let Some((number, shard)) = &mut self.open else {
            return Err(Error::usage("the folder takes no more tensors"));
        };
        shard.write(bytes)?;
        let number = *number;
        if index + 1 == self.shards[number].0.end
            && let Some((_, shard)) = self.open.take()
        {
            shard.commit()?;
            self.next_shard(number + 1)?;
        }
        Ok(())
    }

    fn fill(&mut self, fill: Fill<'_>) -> Result<bool> {
        let mut open: Vec<safetensors::Writer> =
            self.open.take().into_iter().map(|(_, shard)| shard).collect();
        for (range, name) in &self.shards[1..] {
            let items = &self.progress.items[range.clone()];
            open.push(safetensors::Writer::create(items, |bytes| self.staging.file(name, bytes))?);
        }
        // Each item's shard, and its place there.
        let mut places = Vec::with_capacity(self.progress.items.len());
        for (number, shard) in open.iter_mut().enumerate() {
            places.extend(shard.stretch()?.into_iter().map(|start| (number, start)));
        }
        fill(&|item, at, bytes| {
            let (number, start) = places[item];
            open[number].place(start + at as u64, bytes)
        })?;
        for mut shard in open {
            shard.complete();
            shard.commit()?;
        }
        self.progress.complete();
        Ok(true)
    }

    fn finish(mut self: Box<Self>) -> Result<()> {
        self.progress.check_done()?;
        // Still open only where there is no tensor at all.
        if let Some((_, shard)) = self.open.take() {
            shard.commit()?;
        }
        self.staging.publish()
    }
}

/// Which items go into which file: filled in order, a new one where the next item would be too much.
fn shards(items: &[Item], limit: u64) -> Result<Vec<(Range<usize>, String)>> {
    let mut ranges = Vec::new();
    let (mut first, mut bytes) = (0, 0u64);
    for (i, item) in items.iter().enumerate() {
        let more = item.byte_len()?;
        if i > first && bytes.saturating_add(more) > limit {
            ranges.push(first..i);
            (first, bytes) = (i, 0);
        }
        bytes = bytes.saturating_add(more);
    }
    ranges.push(first..items.len());
    let count = ranges.len();
    let name = |i: usize| match count {
        1 => SINGLE.to_string(),
        _ => format!("model-{:05}-of-{count:05}.safetensors", i + 1),
    };
    Ok(ranges.into_iter().enumerate().map(|(i, range)| (range, name(i))).collect())
}

fn index(items: &[Item], shards: &[(Range<usize>, String)]) -> Result<Vec<u8>> {
    let mut total = 0u64;
    let mut map = BTreeMap::new();
    for (range, shard) in shards {
        for item in &items[range.clone()] {
            total = total.saturating_add(item.byte_len()?);
            map.insert(item.name.as_str(), shard.as_str());
        }
    }
    let index = json!({"metadata": {"total_size": total}, "weight_map": map});
    let mut text = serde_json::to_vec_pretty(&index).map_err(|e| Error::usage(e.to_string()))?;
    text.push(b'\n');
    Ok(text)
}

/// Sidecars come from files that are not trusted: each must stay inside the folder, and be one file of it.
fn check_paths(sidecars: &[Sidecar], shards: &[(Range<usize>, String)]) -> Result<()> {
    // In lower case, because some file systems do not tell cases apart.
    let mut taken: HashSet<String> = shards.iter().map(|(_, name)| name.clone()).collect();
    taken.insert(INDEX.to_string());
    for Sidecar { path, .. } in sidecars {
        let refuse = |why: &str| Err(Error::input(format!("cannot write the embedded file {path:?}: {why}")));
        if path.len() > 1024 || path.chars().any(|c| c.is_control() || matches!(c, '\\' | ':')) {
            return refuse("its path is too long or holds a control character, a backslash or a colon");
        }
        if path.split('/').any(|part| matches!(part, "" | "." | "..")) {
            return refuse("its path would lead out of the folder");
        }
        if !taken.insert(path.to_lowercase()) {
            return refuse("another file has the same path");
        }
    }
    Ok(())
}

/// A folder beside the target that takes its place when it is complete, and vanishes if it never is.
struct Staging {
    path: PathBuf,
    asked: PathBuf,
    target: PathBuf,
    force: bool,
}

impl Staging {
    fn create(asked: &Path, force: bool) -> Result<Self> {
        let target = match fs::symlink_metadata(asked) {
            // The folder that a link points to is replaced, not the link.
            Ok(meta) if meta.is_symlink() => {
                fs::canonicalize(asked).map_err(|e| Error::io("cannot write", asked, &e))?
            }
            _ => asked.to_path_buf(),
        };
        let Some(name) = target.file_name() else {
            return Err(Error::usage(format!("{}: give the folder a name", asked.display())));
        };
        replaceable(&target, force)?;
        let parent = parent(&target);
        if !parent.is_dir() {
            return Err(Error::new(
                Kind::Io,
                format!("cannot write {}: the folder {} does not exist", asked.display(), parent.display()),
            ));
        }
        let mut tries = 0;
        loop {
            let number = NUMBER.fetch_add(1, Ordering::Relaxed);
            let path = parent.join(temporary_name(&name.to_string_lossy(), number));
            match fs::create_dir(&path) {
                Ok(()) => return Ok(Staging { path, asked: asked.to_path_buf(), target, force }),
                // Left behind by a process of the same number that was killed.
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists && tries < 1000 => tries += 1,
                Err(e) => return Err(Error::io("cannot write", asked, &e)),
            }
        }
    }

    /// A file in it, at a path that is known to be plain and relative; messages name where it will be.
    fn file(&self, path: &str, bytes: u64) -> Result<AtomicFile> {
        let (here, asked) = (self.path.join(path), self.asked.join(path));
        fs::create_dir_all(parent(&here)).map_err(|e| Error::io("cannot write", &asked, &e))?;
        AtomicFile::create_as(&here, asked, false, bytes)
    }

    /// Puts the folder in its place. At every point the old one or the new one stands there.
    fn publish(&mut self) -> Result<()> {
        sync(&self.path);
        // What is there may have changed meanwhile.
        let occupied = replaceable(&self.target, self.force)?;
        let failed = |e: io::Error| Error::io("cannot put the folder in its place:", &self.target, &e);
        if occupied {
            // Now `path` is the old folder, which drop removes.
            exchange(&self.path, &self.target).map_err(failed)?;
        } else {
            // Takes the place of an empty folder as well.
            fs::rename(&self.path, &self.target).map_err(failed)?;
        }
        sync(parent(&self.target));
        Ok(())
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // Ours, or the old folder that was seen to hold regular files only; gone where it was renamed.
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// Whether there is a folder with something in it, which may be replaced.
fn replaceable(target: &Path, force: bool) -> Result<bool> {
    let shown = target.display();
    let meta = match fs::symlink_metadata(target) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(e) => return Err(Error::io("cannot write", target, &e)),
        Ok(meta) => meta,
    };
    if !meta.is_dir() {
        return Err(Error::usage(format!(
            "{shown} is there and no folder; give another name, or end it in .safetensors or .json for a single file"
        )));
    }
    let unreadable = |e: &io::Error| Error::io("cannot read the folder", target, e);
    let (mut any, mut weights) = (false, false);
    for entry in fs::read_dir(target).map_err(|e| unreadable(&e))? {
        let entry = entry.map_err(|e| unreadable(&e))?;
        let name = entry.file_name();
        if !force {
            return Err(Error::usage(format!(
                "{shown} already exists and is not empty; use --force (force=True) to replace it"
            )));
        }
        if !entry.file_type().map_err(|e| unreadable(&e))?.is_file() {
            return Err(Error::usage(format!(
                "{shown} holds {}, which is no regular file; only a folder of plain files is replaced",
                name.display()
            )));
        }
        any = true;
        weights |= Path::new(&name).extension().is_some_and(|e| e == "safetensors");
    }
    if any && !weights {
        // A slip of the hand must not cost a folder of something else.
        return Err(Error::usage(format!(
            "{shown} holds no .safetensors file; only a model's folder is replaced"
        )));
    }
    Ok(any)
}

/// Swaps two folders in one step, where the system can; otherwise in two, undone if the second fails.
fn exchange(new: &Path, old: &Path) -> io::Result<()> {
    #[cfg(any(target_os = "linux", target_os = "macos"))]
    {
        use std::os::unix::ffi::OsStrExt;
        let c = |path: &Path| std::ffi::CString::new(path.as_os_str().as_bytes()).map_err(io::Error::other);
        let (from, to) = (c(new)?, c(old)?);
        #[cfg(target_os = "linux")]
        // SAFETY: both paths end in a zero byte and outlive the call, which reads nothing else of ours.
        let result = unsafe {
            libc::renameat2(libc::AT_FDCWD, from.as_ptr(), libc::AT_FDCWD, to.as_ptr(), libc::RENAME_EXCHANGE)
        };
        #[cfg(target_os = "macos")]
        // SAFETY: both paths end in a zero byte and outlive the call, which reads nothing else of ours.
        let result = unsafe { libc::renamex_np(from.as_ptr(), to.as_ptr(), libc::RENAME_SWAP) };
        if result == 0 {
            return Ok(());
        }
    }
    let aside = new.with_extension("old");
    fs::rename(old, &aside)?;
    if let Err(e) = fs::rename(new, old) {
        fs::rename(&aside, old)?;
        return Err(e);
    }
    fs::rename(&aside, new)
}

fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

/// Puts a folder's entries on the disk. Some file systems cannot; the entries are there all the same.
fn sync(folder: &Path) {
    if cfg!(unix)
        && let Ok(folder) = File::open(folder)
    {
        let _ = folder.sync_all();
    }
}
