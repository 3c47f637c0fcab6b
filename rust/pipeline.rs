//! A whole model through everything below: compressing to an artifact, and restoring from one.
//!
//! Work happens on a pool of its own while the caller's thread reports progress, so that a callback may be slow
//! or ask for an end. While one tensor is encoded the one before it is hashed and written; no more than those
//! two are in memory.

mod calibrated;
mod compress;
mod decompress;
mod report;

pub(crate) use compress::plain;
pub use compress::{CalibrationOptions, CompressOptions, compress, dry_run};
pub use decompress::{DecompressOptions, decompress};
pub(crate) use report::hex;
pub use report::{CompressReport, DecompressReport, Group, TensorReport};

use crate::error::{Error, Kind, Result};
use crate::runner::Meter;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::time::Duration;

/// Called with weights done and weights in all, several times a second; an error ends the work.
pub type Progress<'a> = &'a dyn Fn(u64, u64) -> Result<()>;

/// How often progress is reported.
const TICK: Duration = Duration::from_millis(100);

/// Runs `work` on a pool of `threads` (0: one for each core) while this thread reports progress.
pub(crate) fn supervised<T: Send>(
    threads: usize,
    total: u64,
    progress: Progress<'_>,
    work: impl FnOnce(&Meter) -> Result<T> + Send,
) -> Result<T> {
    supervised_on(&pool(threads)?, total, progress, work)
}

/// So many threads; 0: one for each core.
pub(crate) fn pool(threads: usize) -> Result<rayon::ThreadPool> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
    pool.map_err(|e| Error::new(Kind::Io, format!("cannot start {threads} threads: {e}")))
}

/// As [`supervised`], on threads that do several things one after another.
pub(crate) fn supervised_on<T: Send>(
    pool: &rayon::ThreadPool,
    total: u64,
    progress: Progress<'_>,
    work: impl FnOnce(&Meter) -> Result<T> + Send,
) -> Result<T> {
    // A caller that wants no work, or an interrupt that came meanwhile, is heard before any is done.
    progress(0, total)?;
    let meter = Meter::default();
    let (send, receive) = sync_channel(1);
    std::thread::scope(|scope| {
        let worker = &meter;
        scope.spawn(move || {
            // The receiver outlives this thread, and there is room for one result.
            let _ = send.send(pool.install(|| work(worker)));
        });
        let mut refused = None;
        loop {
            match receive.recv_timeout(TICK) {
                Ok(result) => {
                    return match refused {
                        Some(error) => Err(error),
                        None => result.and_then(|value| progress(total, total).map(|()| value)),
                    };
                }
                Err(RecvTimeoutError::Timeout) if refused.is_none() => {
                    if let Err(error) = progress(meter.done(), total) {
                        meter.stop();
                        refused = Some(error);
                    }
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(Error::new(Kind::Io, "a worker thread ended without a result"));
                }
            }
        }
    })
}

pub(crate) fn check_running(meter: &Meter) -> Result<()> {
    if meter.is_stopped() { Err(Error::new(Kind::Interrupted, "interrupted")) } else { Ok(()) }
}

/// Refuses an output that is one of the inputs, under whatever name.
pub(crate) fn refuse_overwriting_input(output: &Path, inputs: &[PathBuf]) -> Result<()> {
    let Ok(output_real) = output.canonicalize() else { return Ok(()) };
    let same = |input: &PathBuf| {
        input.canonicalize().is_ok_and(|real| {
            real == output_real || real.starts_with(&output_real) || same_file(&real, &output_real)
        })
    };
    match inputs.iter().find(|input| same(input)) {
        None => Ok(()),
        Some(input) => Err(Error::usage(format!(
            "output {} is the input {}; choose another output",
            output.display(),
            input.display()
        ))),
    }
}

#[cfg(unix)]
fn same_file(a: &Path, b: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let id = |p: &Path| p.metadata().ok().map(|m| (m.dev(), m.ino()));
    id(a).is_some() && id(a) == id(b)
}

#[cfg(not(unix))]
fn same_file(_: &Path, _: &Path) -> bool {
    false
}

/// The name without its place, for messages.
pub(crate) fn named(e: Error, name: &str) -> Error {
    e.at(format_args!("tensor {name:?}"))
}
