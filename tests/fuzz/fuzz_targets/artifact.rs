//! Any bytes as an artifact: refused or read, never a panic and never memory beyond what the file justifies.
//!
//! Checksums would stop the fuzzer at the door, so each input is tried three times: as it is, with its frames
//! sealed again, and as an index in front of which there is nothing but zeros.
#![no_main]

#[path = "../../rust/support/reseal.rs"]
mod reseal;

use libfuzzer_sys::fuzz_target;
use reseal::{index_of, reseal_header, with_index, with_index_at};
use tenpak::artifact::{ArtifactFile, Limits};
use tenpak::tensor::Dtype;

/// Weights that are rebuilt: a few bytes of a file can stand for many empty rows.
const MOST_ELEMENTS: u64 = 1 << 16;

/// Bytes in front of a bare index.
const FRONT: usize = 1024;

fuzz_target!(|data: &[u8]| {
    read(data.to_vec());
    if data.starts_with(b"{") {
        let mut front = vec![0; FRONT];
        front[..8].copy_from_slice(b"\x89TPK\r\n\x1a\n");
        for (at, word) in [(8, 1u32), (12, 64), (24, 256)] {
            front[at..at + 4].copy_from_slice(&word.to_le_bytes());
        }
        reseal_header(&mut front);
        read(with_index_at(&front, data));
        return;
    }
    let mut sealed = data.to_vec();
    reseal_header(&mut sealed);
    if let Some(index) = index_of(&sealed).map(<[u8]>::to_vec) {
        sealed = with_index(&sealed, &index);
    }
    read(sealed);
});

fn read(bytes: Vec<u8>) {
    let Ok(file) = ArtifactFile::from_bytes(bytes, &Limits::default()) else { return };
    let sound = file.verify(&|_, _| Ok(())).is_ok();
    for entry in file.tensors() {
        assert!(file.find(&entry.name).is_ok_and(|found| std::ptr::eq(found, entry)));
        if entry.elements() > MOST_ELEMENTS {
            continue;
        }
        for dtype in [entry.dtype, Dtype::F32] {
            let mut out = vec![0; entry.elements() as usize * dtype.size()];
            let read = file.decode(entry, dtype, &mut out);
            let readable = entry.is_kept() || entry.known_codec().is_some();
            assert!(read.is_ok() || !(sound && readable && dtype == entry.dtype), "{read:?}");
        }
    }
    for name in file.aliases().keys() {
        assert!(file.find(name).is_ok());
    }
}
