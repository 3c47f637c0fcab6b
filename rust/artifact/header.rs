//! The two fixed frames of the file: a 64-byte header at its start and a 64-byte footer at its end.

use super::Limits;
use crate::error::{Error, Result};

/// The first eight bytes: not text, and damaged visibly by whatever changes line ends or drops bit 7.
pub const MAGIC: [u8; 8] = *b"\x89TPK\r\n\x1a\n";

/// The last four bytes.
pub const END_MAGIC: [u8; 4] = *b"TPKE";

/// The version that is written and the only one that is read.
pub const VERSION: u32 = 1;

/// Bytes of the header, and of the footer.
pub const FRAME: usize = 64;

/// Parts and the index start at multiples of this.
pub const ALIGN: u64 = 256;

/// The incompat bit of a file that is a delta: its tensors mean nothing without its base.
pub const DELTA: u32 = 1;

/// Where the first part starts, or the index if there are no parts.
const FIRST: u64 = (FRAME as u64).next_multiple_of(ALIGN);

/// The next place where a part or the index can start, or `None` on overflow.
pub fn align_up(end: u64) -> Option<u64> {
    end.checked_next_multiple_of(ALIGN)
}

/// The header of a file that this version writes, with the incompat bits that it needs.
pub fn header(incompat: u32) -> [u8; FRAME] {
    let mut bytes = [0; FRAME];
    bytes[..8].copy_from_slice(&MAGIC);
    bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
    bytes[12..16].copy_from_slice(&(FRAME as u32).to_le_bytes());
    bytes[16..20].copy_from_slice(&incompat.to_le_bytes());
    // 20..24 compat: no bits are defined yet.
    bytes[24..28].copy_from_slice(&(ALIGN as u32).to_le_bytes());
    seal(&mut bytes, FRAME - 4);
    bytes
}

/// Where the index is, how long the file is, and the index's digest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Footer {
    /// Byte offset of the index.
    pub index_off: u64,
    /// Bytes of the index.
    pub index_len: u64,
    /// Bytes of the whole file.
    pub file_len: u64,
    /// BLAKE3 of the index, which holds the digest of everything else: the artifact's identity.
    pub root: [u8; 32],
}

impl Footer {
    /// The footer's bytes.
    pub fn to_bytes(self) -> [u8; FRAME] {
        let mut bytes = [0; FRAME];
        bytes[..8].copy_from_slice(&self.index_off.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.index_len.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.file_len.to_le_bytes());
        bytes[24..56].copy_from_slice(&self.root);
        bytes[60..].copy_from_slice(&END_MAGIC);
        seal(&mut bytes, 56);
        bytes
    }
}

/// Writes the CRC-32C of the bytes before `at`.
fn seal(bytes: &mut [u8; FRAME], at: usize) {
    let crc = crc32c::crc32c(&bytes[..at]);
    bytes[at..at + 4].copy_from_slice(&crc.to_le_bytes());
}

/// Checks both frames and the index's digest, and returns the footer, the index and the incompat bits. Nothing of
/// the index is parsed before this has passed.
pub fn check<'a>(file: &'a [u8], limits: &Limits) -> Result<(Footer, &'a [u8], u32)> {
    let incompat = check_header(file)?;
    let Some(footer) = file.last_chunk::<FRAME>().filter(|_| file.len() as u64 >= FIRST + FRAME as u64)
    else {
        return Err(cut_short(file));
    };
    if footer[60..] != END_MAGIC {
        return Err(cut_short(file));
    }
    if u32_at(footer, 56) != crc32c::crc32c(&footer[..56]) {
        return Err(Error::artifact("the footer is damaged: its checksum does not match"));
    }
    let mut root = [0; 32];
    root.copy_from_slice(&footer[24..56]);
    let footer = Footer {
        index_off: u64_at(footer, 0),
        index_len: u64_at(footer, 8),
        file_len: u64_at(footer, 16),
        root,
    };
    if footer.file_len != file.len() as u64 {
        return Err(Error::artifact(format!(
            "the file has {} bytes and should have {}; copy it again",
            file.len(),
            footer.file_len
        )));
    }
    if footer.index_len > limits.index_bytes {
        return Err(Error::artifact(format!(
            "the index has {} bytes; at most {} are allowed (the limit can be raised)",
            footer.index_len, limits.index_bytes
        )));
    }
    let index_end = footer.file_len - FRAME as u64;
    let fits = footer.index_off >= FIRST
        && footer.index_off.is_multiple_of(ALIGN)
        && footer.index_off.checked_add(footer.index_len) == Some(index_end);
    if !fits {
        return Err(Error::artifact("the footer does not say where the index is"));
    }
    // Both lie inside the file, whose length is a usize.
    let index = &file[footer.index_off as usize..index_end as usize];
    if blake3::hash(index).as_bytes() != &footer.root {
        return Err(Error::artifact("the index is damaged: its digest does not match"));
    }
    Ok((footer, index, incompat))
}

/// Returns the incompat bits, all of them known.
fn check_header(file: &[u8]) -> Result<u32> {
    if !file.starts_with(&MAGIC) {
        let transferred = file.starts_with(&MAGIC[..4]) && file.len() >= MAGIC.len();
        return Err(Error::artifact(if file.is_empty() {
            "the file is empty"
        } else if transferred {
            "the first bytes are damaged, as by a transfer in text mode; copy the file again, as binary"
        } else {
            "this is no .tenpak artifact (its first bytes say so)"
        }));
    }
    let Some(header) = file.first_chunk::<FRAME>() else {
        return Err(cut_short(file));
    };
    if u32_at(header, 60) != crc32c::crc32c(&header[..60]) {
        return Err(Error::artifact("the header is damaged: its checksum does not match"));
    }
    let version = u32_at(header, 8);
    if version != VERSION {
        return Err(Error::unsupported(format!(
            "this is artifact version {version}, and this tenpak reads version {VERSION}; install a newer tenpak"
        )));
    }
    let incompat = u32_at(header, 16);
    if incompat & !DELTA != 0 {
        return Err(Error::unsupported(format!(
            "the artifact uses a feature that this tenpak does not know (incompat bits {:#x}); install a newer \
             tenpak",
            incompat & !DELTA
        )));
    }
    if u32_at(header, 12) as usize != FRAME || u64::from(u32_at(header, 24)) != ALIGN {
        return Err(Error::artifact(format!(
            "the header says {} bytes of header and alignment {}; version 1 has {FRAME} and {ALIGN}",
            u32_at(header, 12),
            u32_at(header, 24)
        )));
    }
    if header[28..60].iter().any(|&b| b != 0) {
        return Err(Error::artifact("the header's reserved bytes are not zero"));
    }
    Ok(incompat)
}

fn cut_short(file: &[u8]) -> Error {
    Error::artifact(format!(
        "the file is cut short at {} bytes: its end is missing; copy it again",
        file.len()
    ))
}

fn u32_at(bytes: &[u8; FRAME], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn u64_at(bytes: &[u8; FRAME], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}
