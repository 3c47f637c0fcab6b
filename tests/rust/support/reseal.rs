//! Seals a changed artifact again, so that what is behind the checksums can be tested.

/// The header, or the footer.
const FRAME: usize = 64;

/// Writes the header's checksum.
pub fn reseal_header(file: &mut [u8]) {
    if let Some(header) = file.first_chunk_mut::<FRAME>() {
        let crc = crc32c::crc32c(&header[..60]);
        header[60..].copy_from_slice(&crc.to_le_bytes());
    }
}

/// The index, if the footer says where it is.
pub fn index_of(file: &[u8]) -> Option<&[u8]> {
    let footer = file.last_chunk::<FRAME>()?;
    let word = |at: usize| u64::from_le_bytes(footer[at..at + 8].try_into().expect("eight bytes"));
    let (start, len) = (usize::try_from(word(0)).ok()?, usize::try_from(word(8)).ok()?);
    file.get(start..start.checked_add(len)?)
}

/// The same file with another index, and a footer that fits it.
pub fn with_index(file: &[u8], index: &[u8]) -> Vec<u8> {
    let footer = file.last_chunk::<FRAME>().expect("a footer");
    let start = u64::from_le_bytes(footer[..8].try_into().expect("eight bytes"));
    with_index_at(&file[..start as usize], index)
}

/// `front` is everything before the index.
pub fn with_index_at(front: &[u8], index: &[u8]) -> Vec<u8> {
    let mut out = front.to_vec();
    out.extend(index);
    out.extend((front.len() as u64).to_le_bytes());
    out.extend((index.len() as u64).to_le_bytes());
    out.extend(((front.len() + index.len() + FRAME) as u64).to_le_bytes());
    out.extend(blake3::hash(index).as_bytes());
    let crc = crc32c::crc32c(&out[out.len() - 56..]);
    out.extend(crc.to_le_bytes());
    out.extend(b"TPKE");
    out
}
