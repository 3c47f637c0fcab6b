//! Files that appear whole or not at all: a temporary file beside the target, fsync, then a rename.

use crate::error::{Error, Result};
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// Small writes are gathered up to this size; larger ones go straight to the file.
const BUFFER: usize = 1 << 20;

/// Symbolic links that are followed before a target is called circular.
const MAX_LINKS: usize = 40;

/// Tells apart the temporary files of one process.
static NUMBER: AtomicU64 = AtomicU64::new(0);

/// A file under construction. [`AtomicFile::commit`] puts it in its place; dropping it removes it.
#[derive(Debug)]
pub struct AtomicFile {
    file: Option<BufWriter<File>>,
    temp: PathBuf,
    /// Where the file will stand: the request with its symbolic links followed.
    target: PathBuf,
    asked: PathBuf,
    force: bool,
    written: u64,
}

/// What is written before it takes the place of `name`; names may have 255 bytes.
pub(crate) fn temporary_name(name: &str, number: u64) -> String {
    let mut end = name.len().min(200);
    while !name.is_char_boundary(end) {
        end -= 1;
    }
    format!(".{}.{}-{number}.tmp", &name[..end], std::process::id())
}

impl AtomicFile {
    /// Starts a file that will stand at `target`, and asks for room for `expected_bytes` (0: unknown).
    ///
    /// # Errors
    /// A usage error if the target exists and `force` is not given, or is no regular file; an I/O error if
    /// its folder is missing or not writable, or the file system has too little space.
    pub fn create(target: &Path, force: bool, expected_bytes: u64) -> Result<AtomicFile> {
        Self::create_as(target, target.to_path_buf(), force, expected_bytes)
    }

    /// As [`AtomicFile::create`]; messages speak of `asked`, where the file will be in the end.
    pub(crate) fn create_as(
        target: &Path,
        asked: PathBuf,
        force: bool,
        expected_bytes: u64,
    ) -> Result<AtomicFile> {
        let target = follow_links(target)?;
        let old = replaceable(&target, &asked, force)?;
        let name = target
            .file_name()
            .ok_or_else(|| Error::usage(format!("{} does not name a file", asked.display())))?
            .to_string_lossy()
            .into_owned();
        let folder = parent(&target);
        if !folder.is_dir() {
            return Err(Error::new(
                crate::Kind::Io,
                format!("cannot write {}: the folder {} does not exist", asked.display(), folder.display()),
            ));
        }
        check_space(folder, &asked, expected_bytes)?;

        let mut tries = 0;
        let (temp, file) = loop {
            let n = NUMBER.fetch_add(1, Ordering::Relaxed);
            let temp = folder.join(temporary_name(&name, n));
            match OpenOptions::new().write(true).create_new(true).open(&temp) {
                Ok(file) => break (temp, file),
                // Left behind by a process of the same number that was killed.
                Err(e) if e.kind() == ErrorKind::AlreadyExists && tries < 1000 => tries += 1,
                Err(e) => return Err(write_error(&asked, &e)),
            }
        };
        if let Some(permissions) = old.as_ref().map(fs::Metadata::permissions) {
            // Best effort: the file's contents matter more than its mode.
            let _ = file.set_permissions(permissions);
        }
        let file = Some(BufWriter::with_capacity(BUFFER, file));
        Ok(AtomicFile { file, temp, target, asked, force, written: 0 })
    }

    /// Bytes written so far.
    pub fn written(&self) -> u64 {
        self.written
    }

    /// Writes all of `bytes`; as [`Write::write_all`], with an error for people.
    ///
    /// # Errors
    /// An I/O error that names the target.
    pub fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.write_all(bytes).map_err(|e| self.error(&e))
    }

    /// Makes the file `len` bytes long, so that [`AtomicFile::place`] can fill it in any order.
    ///
    /// # Errors
    /// An I/O error that names the target.
    pub fn stretch(&mut self, len: u64) -> Result<()> {
        let stretched = self.flush().and_then(|()| self.open()?.set_len(len));
        stretched.map_err(|e| self.error(&e))?;
        self.written = len;
        Ok(())
    }

    /// Writes `bytes` at a place of a file that has been stretched; many threads may do so at once.
    ///
    /// # Errors
    /// An I/O error that names the target.
    pub fn place(&self, at: u64, bytes: &[u8]) -> Result<()> {
        let placed = self.open().and_then(|file| {
            write_at(file, at, bytes)?;
            start_sync(file, at, bytes.len());
            Ok(())
        });
        placed.map_err(|e| self.error(&e))
    }

    fn open(&self) -> io::Result<&File> {
        self.file.as_ref().map(BufWriter::get_ref).ok_or_else(|| io::Error::other("the file is closed"))
    }

    /// The error for people that stands for a failed write to this file.
    pub fn error(&self, source: &io::Error) -> Error {
        write_error(&self.asked, source)
    }

    /// Puts the file in its place: all of it is on the disk when this returns.
    ///
    /// # Errors
    /// An I/O error if the last bytes cannot be written or the file not be renamed; a usage error if the
    /// target came into being meanwhile and `force` was not given. The old target, if any, is untouched.
    pub fn commit(mut self) -> Result<()> {
        let finish = |writer: BufWriter<File>| -> io::Result<()> {
            let file = writer.into_inner().map_err(io::IntoInnerError::into_error)?;
            file.sync_all()
        };
        let writer = self.file.take().expect("only commit and drop take the file");
        finish(writer).map_err(|e| self.error(&e))?;
        replaceable(&self.target, &self.asked, self.force)?;
        fs::rename(&self.temp, &self.target).map_err(|e| self.error(&e))?;
        sync_folder(parent(&self.target));
        Ok(())
    }
}

impl Write for AtomicFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let writer = self.file.as_mut().ok_or_else(|| io::Error::other("the file is closed"))?;
        let n = writer.write(bytes)?;
        self.written += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.as_mut().map_or(Ok(()), BufWriter::flush)
    }
}

impl Drop for AtomicFile {
    fn drop(&mut self) {
        if let Some(writer) = self.file.take() {
            // Taken apart, it does not try once more to write what it still holds.
            drop(writer.into_parts());
        }
        // After a commit there is nothing left to remove.
        let _ = fs::remove_file(&self.temp);
    }
}

#[cfg(unix)]
fn write_at(file: &File, at: u64, bytes: &[u8]) -> io::Result<()> {
    std::os::unix::fs::FileExt::write_all_at(file, bytes, at)
}

/// Has the system start to put bytes on the disk, so that [`AtomicFile::commit`] need not wait for all of them.
fn start_sync(file: &File, at: u64, len: usize) {
    #[cfg(target_os = "linux")]
    {
        use std::os::fd::AsRawFd;
        // SAFETY: the file is open; the call touches no memory of ours. Failure is harmless: `commit` waits for all.
        let _ = unsafe {
            let (at, len) = (at.cast_signed(), len as libc::off64_t);
            libc::sync_file_range(file.as_raw_fd(), at, len, libc::SYNC_FILE_RANGE_WRITE)
        };
    }
    #[cfg(not(target_os = "linux"))]
    let _ = (file, at, len);
}

#[cfg(windows)]
fn write_at(file: &File, mut at: u64, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        let n = std::os::windows::fs::FileExt::seek_write(file, bytes, at)?;
        if n == 0 {
            return Err(ErrorKind::WriteZero.into());
        }
        at += n as u64;
        bytes = &bytes[n..];
    }
    Ok(())
}

fn write_error(target: &Path, source: &io::Error) -> Error {
    let remedy = match source.kind() {
        ErrorKind::StorageFull => "; free some space, or write to another disk",
        ErrorKind::QuotaExceeded => "; the quota is used up",
        ErrorKind::FileTooLarge => "; the file system or a limit of the process allows no larger file",
        ErrorKind::PermissionDenied => "; choose a folder that you may write to",
        ErrorKind::ReadOnlyFilesystem => "; choose a disk that can be written to",
        _ => "",
    };
    Error::new(crate::Kind::Io, format!("cannot write {}: {source}{remedy}", target.display()))
}

/// The target's metadata if it is a file that may be replaced, `None` if there is nothing yet.
fn replaceable(target: &Path, asked: &Path, force: bool) -> Result<Option<fs::Metadata>> {
    let old = match fs::metadata(target) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(write_error(asked, &e)),
        Ok(old) => old,
    };
    let shown = asked.display();
    if old.is_dir() {
        return Err(Error::usage(format!("cannot write {shown}: it is a folder; give a file name in it")));
    }
    if !old.is_file() {
        return Err(Error::usage(format!("cannot write {shown}: it is not a regular file")));
    }
    if !force {
        return Err(Error::usage(format!("{shown} already exists; use --force (force=True) to replace it")));
    }
    Ok(Some(old))
}

fn follow_links(path: &Path) -> Result<PathBuf> {
    let mut path_now = path.to_path_buf();
    for _ in 0..MAX_LINKS {
        match fs::read_link(&path_now) {
            Ok(next) => path_now = parent(&path_now).join(next),
            // Not a link, or not there at all.
            Err(_) => return Ok(path_now),
        }
    }
    Err(Error::usage(format!("cannot write {}: its symbolic links go round in a circle", path.display())))
}

fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

/// Puts a rename on the disk. Some file systems cannot; the rename itself has happened all the same.
fn sync_folder(folder: &Path) {
    if cfg!(unix)
        && let Ok(folder) = File::open(folder)
    {
        let _ = folder.sync_all();
    }
}

/// An I/O error that names `asked` where the file system of `folder` has too little space.
#[cfg(unix)]
#[allow(clippy::unnecessary_cast, reason = "the fields' types differ between systems")]
pub(crate) fn check_space(folder: &Path, asked: &Path, needed: u64) -> Result<()> {
    use std::os::unix::ffi::OsStrExt;
    let Ok(path) = std::ffi::CString::new(folder.as_os_str().as_bytes()) else {
        return Err(Error::usage(format!("{} holds a zero byte", asked.display())));
    };
    // SAFETY: zeroes are a valid value of this plain C struct.
    let mut stat: libc::statvfs = unsafe { std::mem::zeroed() };
    // SAFETY: the path ends in a zero byte, and `stat` outlives the call.
    if unsafe { libc::statvfs(path.as_ptr(), &raw mut stat) } != 0 {
        // Writing will tell; not every file system knows its free space.
        return Ok(());
    }
    let free = (stat.f_bavail as u64).saturating_mul(stat.f_frsize as u64);
    // A file system that says it has no blocks at all does not count them.
    if stat.f_blocks == 0 || needed <= free {
        return Ok(());
    }
    Err(Error::new(
        crate::Kind::Io,
        format!(
            "cannot write {}: it needs {:.1} MB, and {:.1} MB are free; free some space, or write to another disk",
            asked.display(),
            needed as f64 / 1e6,
            free as f64 / 1e6,
        ),
    ))
}

#[cfg(not(unix))]
pub(crate) fn check_space(_: &Path, _: &Path, _: u64) -> Result<()> {
    Ok(())
}
