//! The table of codecs, which everything reads: a layout (bytes), an encoder (how codes are chosen), a name.
//!
//! A codec knows rows of finite floats; never files, threads or Python. To add one: write its layout and
//! encoder in a file of this folder and list it in [`ALL`]; the console script, the Python API, `inspect`,
//! `bench`, docs/codecs.md and the tests pick it up from there.

mod affine;
mod affine_u8;
mod descent;
mod factor;
mod feedback;
mod groups;
mod half_floats;
mod int8_sym;
mod lut;
mod minmax;
mod outputs;
mod range;
mod search;
pub mod simd;
mod trial;

pub use factor::{Cholesky, Factor};
pub use feedback::{Column, OutputError, ROWS as FEEDBACK_ROWS, store_bits};
pub use half_floats::{narrow_f16, widen_f16};
pub use lut::Tables;
pub use outputs::{Outputs, owed};
pub use range::{EXPONENTS, Range};

use search::Search;
use simd::Level;

use crate::error::{Error, Result};
use crate::tensor::Dtype;

/// What a row of a part counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Per {
    /// One code of that many bits for each weight, packed low bits first; every row starts at a byte.
    Weight(u32),
    /// One element for each run of that many weights, the last of which may be shorter.
    Run(usize),
    /// That many elements for each row.
    Row(usize),
}

/// One array of a layout: `[rows, per_row(cols)]` elements, row-major.
#[derive(Clone, Copy, Debug)]
pub struct Part {
    /// The name that the artifact's index uses: `codes`, `scales`, …
    pub name: &'static str,
    /// The element type; codes narrower than a byte are U8.
    pub dtype: Dtype,
    /// How many elements a row holds.
    pub per: Per,
}

impl Part {
    /// Elements in one row of `cols` weights.
    pub const fn per_row(&self, cols: usize) -> usize {
        match self.per {
            Per::Weight(bits) => (cols * bits as usize).div_ceil(8 * self.dtype.size()),
            Per::Run(n) => cols.div_ceil(n),
            Per::Row(n) => n,
        }
    }

    /// Bytes of one row of `cols` weights.
    pub const fn row_bytes(&self, cols: usize) -> usize {
        self.per_row(cols) * self.dtype.size()
    }
}

/// Rows of weights to encode: `data` is `[rows, cols]`, row-major.
#[derive(Clone, Copy, Debug)]
pub struct Strip<'a> {
    /// The weights.
    pub data: &'a [f32],
    /// Weights per row.
    pub cols: usize,
    /// The importance of each column (`[cols]`, positive), the same for every row; `None` means 1.
    pub importance: Option<&'a [f32]>,
}

impl Strip<'_> {
    /// The number of rows.
    pub fn rows(&self) -> usize {
        self.data.len().checked_div(self.cols).unwrap_or(0)
    }
}

/// What a codec stores and how a weight is rebuilt from it.
pub struct Layout {
    /// The layout's name.
    pub name: &'static str,
    /// Weights that share parameters; `None` where that is the whole row.
    pub group: Option<usize>,
    /// Bits of one code.
    pub code_bits: u32,
    /// The arrays that are stored.
    pub parts: &'static [Part],
    /// The rebuilt weight, as a formula for people.
    pub rebuild: &'static str,
    /// The largest magnitude of a tensor from which FP16 parameters are precise; below it (and above what
    /// FP16 holds) a tensor is scaled by a power of two, the index's `exponent`.
    pub normal_from: f32,
    /// The tables that codes index, where there are some.
    pub tables: Option<&'static Tables>,
    /// Decodes whole rows: `parts[i]` holds rows of part i, `out` is `[rows, cols]`.
    pub decode: fn(level: Level, parts: &[&[u8]], cols: usize, out: &mut [f32]),
    /// As [`Codec::encode`], for rows whose own numbers (the parts that are [`Per::Row`]) are given: what is stored
    /// for single groups follows small changes of the weights in small steps. `None` where groups do not depend on
    /// such numbers.
    pub under_rows: Option<Encode>,
    /// How codes are chosen with statistics of the layer's input; `None` where they gain nothing.
    pub calibrated: Option<Calibrated>,
}

/// See [`Codec::encode`].
pub type Encode = fn(level: Level, strip: Strip<'_>, parts: &mut [&mut [u8]]) -> Range;

/// A layout's encoders that heed the layer's input, whatever the codec's own is.
#[derive(Clone, Copy)]
pub struct Calibrated {
    /// The search, which weights squared errors with the strip's importance ("diag").
    pub search: fn(level: Level, strip: Strip<'_>, parts: &mut [&mut [u8]]) -> Range,
    /// Chooses the codes of at most [`FEEDBACK_ROWS`] rows again, column by column ("gptq").
    pub feedback: Feedback,
}

/// See [`Calibrated::feedback`]; `parts` hold what the search has chosen.
pub type Feedback = fn(
    level: Level,
    layout: &Layout,
    factor: &Factor,
    strip: Strip<'_>,
    parts: &mut [&mut [u8]],
) -> OutputError;

/// One row of the table.
pub struct Codec {
    /// The name that people type.
    pub name: &'static str,
    /// The version of the bytes under that name.
    pub version: u32,
    /// One line for people: when to choose it.
    pub summary: &'static str,
    /// The bytes.
    pub layout: &'static Layout,
    /// How codes are chosen, by name: `min/max`, `search`, `nearest`.
    pub encoder: &'static str,
    /// Encodes whole rows: fills `parts[i]` with rows of part i. What it writes means nothing where the
    /// range that it returns is not finite.
    pub encode: fn(level: Level, strip: Strip<'_>, parts: &mut [&mut [u8]]) -> Range,
}

/// The name of encoders that search; these can weigh squared errors.
pub const SEARCH: &str = "search";

/// Every codec, in the order that people read them.
pub static ALL: &[Codec] = &[
    Codec {
        name: "int4_opt_v1",
        version: 1,
        summary: "the default: small and accurate, no calibration",
        layout: &INT4_G16_FP16,
        encoder: SEARCH,
        encode: affine::encode::<Search, 16>,
    },
    Codec {
        name: "int4_opt_llama_v1",
        version: 1,
        summary: "more accurate and larger, for small or sensitive models",
        layout: &INT4_G8_FP16,
        encoder: SEARCH,
        encode: affine::encode::<Search, 8>,
    },
    Codec {
        name: "int4_g8_fp16_v1",
        version: 1,
        summary: "plain min/max groups of 8: fastest to make",
        layout: &INT4_G8_FP16,
        encoder: "min/max",
        encode: minmax::encode::<8>,
    },
    Codec {
        name: "int4_g16_fp16_v1",
        version: 1,
        summary: "plain min/max groups of 16: fastest to make",
        layout: &INT4_G16_FP16,
        encoder: "min/max",
        encode: minmax::encode::<16>,
    },
    Codec {
        name: "int4_g32_fp16_v1",
        version: 1,
        summary: "plain min/max groups of 32: the numbers of GGUF's Q4_1",
        layout: &INT4_G32_FP16,
        encoder: "min/max",
        encode: minmax::encode::<32>,
    },
    Codec {
        name: "int4_g8_v1",
        version: 1,
        summary: "groups of 8 with one-byte parameters: near int4_opt_llama_v1, a quarter smaller",
        layout: &INT4_G8_U8,
        encoder: SEARCH,
        encode: affine_u8::encode::<8, 4>,
    },
    Codec {
        name: "int4_g16_v1",
        version: 1,
        summary: "groups of 16 with one-byte parameters: near int4_opt_v1, a sixth smaller",
        layout: &INT4_G16_U8,
        encoder: SEARCH,
        encode: affine_u8::encode::<16, 4>,
    },
    Codec {
        name: "int5_g32_v1",
        version: 1,
        summary: "five bits: less error than any four-bit codec, at 5.5 bits",
        layout: &INT5_G32_U8,
        encoder: SEARCH,
        encode: affine_u8::encode::<32, 5>,
    },
    Codec {
        name: "int6_g32_v1",
        version: 1,
        summary: "six bits: near int8_sym_v1 and a fifth smaller",
        layout: &INT6_G32_U8,
        encoder: SEARCH,
        encode: affine_u8::encode::<32, 6>,
    },
    Codec {
        name: "int8_sym_v1",
        version: 1,
        summary: "eight bits, practically lossless: for embeddings and heads",
        layout: &int8_sym::INT8_SYM,
        encoder: "nearest",
        encode: int8_sym::encode,
    },
    Codec {
        name: "int4_lut16_v1",
        version: 1,
        summary: "7x, from learned tables: near the default at three quarters of its size",
        layout: &INT4_LUT16,
        encoder: SEARCH,
        encode: lut::encode::<16>,
    },
    Codec {
        name: "int4_lut32_v1",
        version: 1,
        summary: "the smallest: 7.5x, from learned tables",
        layout: &INT4_LUT32,
        encoder: SEARCH,
        encode: lut::encode::<32>,
    },
];

static INT4_G8_FP16: Layout = affine::layout::<8>("int4_g8_fp16", &const { affine::parts::<8>() });
static INT4_G16_FP16: Layout = affine::layout::<16>("int4_g16_fp16", &const { affine::parts::<16>() });
static INT4_G32_FP16: Layout = affine::layout::<32>("int4_g32_fp16", &const { affine::parts::<32>() });
static INT4_G8_U8: Layout = affine_u8::layout::<8, 4>("int4_g8_u8", &const { affine_u8::parts::<8>() });
static INT5_G32_U8: Layout =
    affine_u8::layout::<32, 5>("int5_g32_u8", &const { affine_u8::parts_with_high::<32, 5>() });
static INT6_G32_U8: Layout =
    affine_u8::layout::<32, 6>("int6_g32_u8", &const { affine_u8::parts_with_high::<32, 6>() });
static INT4_LUT16: Layout = lut::layout::<16>("int4_lut16", &const { lut::parts::<16>() });
static INT4_LUT32: Layout = lut::layout::<32>("int4_lut32", &const { lut::parts::<32>() });
static INT4_G16_U8: Layout = affine_u8::layout::<16, 4>("int4_g16_u8", &const { affine_u8::parts::<16>() });

/// The codec of that name.
///
/// # Errors
/// A usage error that lists the names there are.
pub fn find(name: &str) -> Result<&'static Codec> {
    ALL.iter().find(|c| c.name == name).ok_or_else(|| {
        let names: Vec<_> = ALL.iter().map(|c| c.name).collect();
        Error::usage(format!("unknown codec {name:?}; choose one of {}", names.join(", ")))
    })
}

impl Layout {
    /// Bytes of every part for `rows` rows of `cols` weights, or `None` on overflow.
    pub fn part_bytes(&self, rows: u64, cols: u64) -> Option<Vec<u64>> {
        let cols = usize::try_from(cols).ok().filter(|&c| c < 1 << 56)?;
        self.parts.iter().map(|p| rows.checked_mul(p.row_bytes(cols) as u64)).collect()
    }

    /// Bits per weight in long rows, parameters per row left out.
    pub fn bits_per_weight(&self) -> f64 {
        let bits = |p: &Part| match p.per {
            Per::Weight(bits) => f64::from(bits),
            Per::Run(n) => (p.dtype.size() * 8) as f64 / n as f64,
            Per::Row(_) => 0.0,
        };
        self.parts.iter().map(bits).sum()
    }

    /// Whether each row stores something beside [`Layout::bits_per_weight`].
    pub fn has_row_parameters(&self) -> bool {
        self.parts.iter().any(|p| matches!(p.per, Per::Row(_)))
    }
}
