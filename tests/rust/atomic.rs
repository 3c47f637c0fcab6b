//! Files that appear whole or not at all, whatever goes wrong.

mod support;

use std::fs;
use std::io::Write;
use std::path::Path;
use tenpak::Kind;
use tenpak::atomic::AtomicFile;

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn nothing_shows_before_commit_and_nothing_stays_after_drop() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("out");
    let mut file = AtomicFile::create(&target, false, 10).unwrap();
    file.write_all(&vec![1; 3 << 20]).unwrap();
    file.put(b"end").unwrap();
    assert_eq!(file.written(), (3 << 20) + 3);
    assert!(!target.exists());
    assert!(names(folder.path())[0].starts_with(&format!(".out.{}-", std::process::id())));
    file.commit().unwrap();
    assert_eq!(names(folder.path()), ["out"]);
    assert_eq!(fs::read(&target).unwrap().len(), (3 << 20) + 3);

    let mut file = AtomicFile::create(&target, true, 0).unwrap();
    file.write_all(b"new").unwrap();
    drop(file);
    assert_eq!(names(folder.path()), ["out"]);
    assert_eq!(fs::read(&target).unwrap().len(), (3 << 20) + 3);
}

#[test]
fn targets_that_must_not_be_replaced_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("out");
    let refuse = |path: &Path, force, words: &str| {
        let error = AtomicFile::create(path, force, 0).unwrap_err();
        assert!(error.to_string().contains(words), "{error}");
        error.kind()
    };
    // What comes into being while we write is not replaced either.
    let file = AtomicFile::create(&target, false, 0).unwrap();
    fs::write(&target, b"other").unwrap();
    assert_eq!(file.commit().unwrap_err().kind(), Kind::Usage);
    assert_eq!(fs::read(&target).unwrap(), b"other");

    assert_eq!(refuse(&target, false, "--force"), Kind::Usage);
    assert_eq!(refuse(folder.path(), true, "is a folder"), Kind::Usage);
    assert_eq!(refuse(&folder.path().join("none/out"), true, "does not exist"), Kind::Io);
    let error = AtomicFile::create(&folder.path().join("new"), false, u64::MAX).unwrap_err();
    assert!(error.kind() == Kind::Io && error.to_string().contains("are free"), "{error}");
    assert_eq!(names(folder.path()), ["out"]);
}

#[cfg(unix)]
#[test]
fn permissions_and_symbolic_links_stay() {
    use std::os::unix::fs::{PermissionsExt, symlink};
    let folder = tempfile::tempdir().unwrap();
    let (real, link) = (folder.path().join("sub/real"), folder.path().join("link"));
    fs::create_dir(folder.path().join("sub")).unwrap();
    symlink("sub/real", &link).unwrap();
    let write = |bytes: &[u8]| {
        let mut file = AtomicFile::create(&link, true, 0).unwrap();
        file.write_all(bytes).unwrap();
        file.commit().unwrap();
    };
    write(b"one");
    assert_eq!(fs::read(&real).unwrap(), b"one");
    fs::set_permissions(&real, fs::Permissions::from_mode(0o640)).unwrap();
    write(b"two");
    assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
    assert_eq!(fs::read(&real).unwrap(), b"two");
    assert_eq!(fs::metadata(&real).unwrap().permissions().mode() & 0o777, 0o640);
    assert_eq!(names(&folder.path().join("sub")), ["real"]);

    symlink("b", folder.path().join("a")).unwrap();
    symlink("a", folder.path().join("b")).unwrap();
    assert_eq!(AtomicFile::create(&folder.path().join("a"), true, 0).unwrap_err().kind(), Kind::Usage);
    assert_eq!(AtomicFile::create(Path::new("/dev/null"), true, 0).unwrap_err().kind(), Kind::Usage);
}

/// Runs one of the ignored tests below in a process of its own, with a folder to work in.
#[cfg(unix)]
fn child(test: &str, folder: &Path) -> std::process::Command {
    let mut command = std::process::Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--ignored", "--nocapture"]).env("TENPAK_TEST_FOLDER", folder);
    command.stdout(std::process::Stdio::piped());
    command
}

#[cfg(unix)]
fn child_folder() -> Option<std::path::PathBuf> {
    std::env::var_os("TENPAK_TEST_FOLDER").map(Into::into)
}

#[cfg(unix)]
#[test]
fn a_write_that_fails_leaves_the_old_file() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("out"), b"old").unwrap();
    let output = child("child_hits_a_file_size_limit", folder.path()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    assert_eq!(names(folder.path()), ["out"]);
    assert_eq!(fs::read(folder.path().join("out")).unwrap(), b"old");
}

#[cfg(unix)]
#[test]
#[ignore = "runs as a child of a_write_that_fails_leaves_the_old_file"]
fn child_hits_a_file_size_limit() {
    let Some(folder) = child_folder() else { return };
    // SAFETY: both calls only change limits and signals of this process, which runs this test alone.
    unsafe {
        libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
        let limit = libc::rlimit { rlim_cur: 5 << 20, rlim_max: 5 << 20 };
        assert_eq!(libc::setrlimit(libc::RLIMIT_FSIZE, &raw const limit), 0);
    }
    // In a write, and in the last flush.
    for (writes, size) in [(100, 1 << 20), (52_500, 100)] {
        let mut file = AtomicFile::create(&folder.join("out"), true, 0).unwrap();
        let block = vec![7; size];
        let error =
            (0..writes).find_map(|_| file.put(&block).err()).unwrap_or_else(|| file.commit().unwrap_err());
        assert!(error.kind() == Kind::Io && error.to_string().contains("cannot write"), "{error}");
    }
}

#[cfg(unix)]
#[test]
fn a_kill_at_any_moment_leaves_a_whole_file() {
    use std::io::{BufRead, BufReader};
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.tenpak");
    support::small_artifact(&path);
    for round in 0..12 {
        let mut running = child("child_rewrites_for_ever", folder.path()).spawn().unwrap();
        let lines = BufReader::new(running.stdout.take().unwrap()).lines();
        assert!(
            lines.map_while(Result::ok).any(|line| line.contains("rewriting")),
            "the child did not start"
        );
        std::thread::sleep(std::time::Duration::from_micros(700 * round));
        running.kill().unwrap();
        running.wait().unwrap();
        let file = tenpak::ArtifactFile::open(&path).unwrap();
        file.verify(&|_, _| Ok(())).unwrap();
    }
}

#[cfg(unix)]
#[test]
#[ignore = "runs as a child of a_kill_at_any_moment_leaves_a_whole_file"]
fn child_rewrites_for_ever() {
    let Some(folder) = child_folder() else { return };
    println!("rewriting");
    loop {
        support::small_artifact(&folder.join("m.tenpak"));
    }
}
