//! One plane of bytes (all lowest bytes of some words, say), compressed where that helps.

use crate::error::{Error, Result};
use std::io;
use zstd::bulk::{Compressor, Decompressor};
use zstd::zstd_safe::{CParameter, ParamSwitch};

/// Slower levels find no more where, as here, next to nothing repeats but zeros.
const LEVEL: i32 = 1;

/// A level that looks for hardly any repetition: bytes are coded by how frequent they are.
const NO_SEARCH: i32 = -(1 << 17);

/// Bits per byte above which there is nothing to find: zeros in a row are what repeats.
const DENSE: f64 = 2.5;

/// Bits per byte above which coding gains nothing.
const RANDOM: f64 = 7.97;

/// Bytes that are looked at together, whatever the first of them is.
const BLOCK: usize = 256;

/// How a plane is stored: the first of its five bytes of head; the other four are its stored length.
const ZEROS: u8 = 0;
const PLAIN: u8 = 1;
const ZSTD: u8 = 2;

/// What coding planes needs and is dear to make.
pub struct Coder {
    /// For planes that are dense, and for others.
    compressors: [Compressor<'static>; 2],
    decompressor: Decompressor<'static>,
    room: Vec<u8>,
}

impl Coder {
    /// With zstd's own state.
    pub fn new() -> Result<Coder> {
        let failed = |e: io::Error| Error::new(crate::Kind::Io, format!("cannot start zstd: {e}"));
        let mut dense = Compressor::new(NO_SEARCH).map_err(failed)?;
        dense.set_parameter(CParameter::LiteralCompressionMode(ParamSwitch::Enable)).map_err(failed)?;
        Ok(Coder {
            compressors: [dense, Compressor::new(LEVEL).map_err(failed)?],
            decompressor: Decompressor::new().map_err(failed)?,
            room: Vec::new(),
        })
    }

    /// Appends a plane: a head of five bytes, then what is stored.
    pub fn put(&mut self, plane: &[u8], out: &mut Vec<u8>) {
        let mut head = |kind: u8, stored: &[u8]| {
            out.push(kind);
            out.extend_from_slice(&(stored.len() as u32).to_le_bytes());
            out.extend_from_slice(stored);
        };
        if plane.chunks(BLOCK).all(|block| block.iter().fold(0, |any, b| any | b) == 0) {
            return head(ZEROS, &[]);
        }
        let entropy = entropy(plane);
        if entropy < RANDOM {
            let compressor = &mut self.compressors[usize::from(entropy < DENSE)];
            self.room.clear();
            self.room.reserve(zstd::zstd_safe::compress_bound(plane.len()));
            if compressor.compress_to_buffer(plane, &mut self.room).is_ok() && self.room.len() < plane.len() {
                return head(ZSTD, &self.room);
            }
        }
        head(PLAIN, plane);
    }

    /// Takes a plane of `plane.len()` bytes from the start of `stored`.
    ///
    /// # Errors
    /// An artifact error for anything that [`Coder::put`] does not write.
    pub fn take(&mut self, stored: &mut &[u8], plane: &mut [u8]) -> Result<()> {
        let (&kind, rest) = stored.split_first().ok_or_else(cut_short)?;
        let (len, rest) = rest.split_first_chunk::<4>().ok_or_else(cut_short)?;
        let (bytes, rest) = rest.split_at_checked(u32::from_le_bytes(*len) as usize).ok_or_else(cut_short)?;
        *stored = rest;
        let complete = match kind {
            ZEROS => {
                plane.fill(0);
                bytes.is_empty()
            }
            PLAIN if bytes.len() == plane.len() => {
                plane.copy_from_slice(bytes);
                true
            }
            // Never more than the plane's own bytes, whatever the frame claims.
            ZSTD => self.decompressor.decompress_to_buffer(bytes, plane).is_ok_and(|n| n == plane.len()),
            _ => false,
        };
        if complete { Ok(()) } else { Err(Error::artifact("a plane of differences is malformed")) }
    }
}

fn cut_short() -> Error {
    Error::artifact("the differences are cut short")
}

/// Bits per byte of a plane, from a sample of it, were each byte coded by itself.
pub fn entropy(plane: &[u8]) -> f64 {
    const RUN: usize = 64;
    const MOST: usize = 1 << 14;
    let mut counts = [0u32; 256];
    let step = (plane.len() / MOST).max(1) * RUN;
    let mut total = 0u32;
    for start in (0..plane.len()).step_by(step) {
        for &b in &plane[start..(start + RUN).min(plane.len())] {
            counts[b as usize] += 1;
            total += 1;
        }
    }
    bits(&counts, total)
}

/// Bits per symbol of a histogram.
pub fn bits(counts: &[u32], total: u32) -> f64 {
    let total = f64::from(total.max(1));
    counts.iter().filter(|&&n| n > 0).map(|&n| f64::from(n) / total).map(|p| -p * p.log2()).sum()
}
