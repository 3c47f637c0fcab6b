//! Laws that every row of the codec table keeps: listing a codec tests it.

use half::f16;
use proptest::prelude::*;
use tenpak::codec::simd::Level;
use tenpak::codec::{self, Codec, Strip};
use tenpak::runner;
use tenpak::tensor::{Dtype, Encoding, Tensor};

/// Relative squared errors that no codec may exceed on Gaussian weights, by its bits per weight.
fn error_limit(codec: &Codec) -> f64 {
    if codec.layout.code_bits == 8 { 1e-4 } else { 7e-3 }
}

fn gaussian(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut uniform = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        ((state >> 40) as f32 + 0.5) / (1u64 << 24) as f32
    };
    (0..n)
        .map(|_| 0.02 * (-2.0 * uniform().ln()).sqrt() * (std::f32::consts::TAU * uniform()).cos())
        .collect()
}

fn encode(codec: &Codec, shape: &[usize], axis: usize, weights: &[f32]) -> runner::Encoded {
    runner::encode(&runner::tensor_of(shape, weights), axis, codec, None, true)
        .expect("finite weights encode")
}

fn decode(codec: &Codec, shape: &[usize], axis: usize, encoded: &runner::Encoded) -> Vec<f32> {
    let parts: Vec<&[u8]> = encoded.parts.iter().map(Vec::as_slice).collect();
    let mut out = vec![0u8; shape.iter().product::<usize>() * 4];
    runner::decode(codec, encoded.outcome.exponent, shape, axis, &parts, Dtype::F32, &mut out)
        .expect("decodes");
    out.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

fn error(x: &[f32], y: &[f32]) -> f64 {
    let sum =
        |f: fn(f64, f64) -> f64| x.iter().zip(y).map(|(a, b)| f(f64::from(*a), f64::from(*b))).sum::<f64>();
    sum(|a, b| (a - b) * (a - b)) / sum(|a, _| a * a).max(f64::MIN_POSITIVE)
}

#[test]
fn names_are_unique_and_found() {
    for codec in codec::ALL {
        assert!(std::ptr::eq(codec::find(codec.name).unwrap(), codec));
        assert!(codec.name.ends_with(&format!("_v{}", codec.version)));
    }
    let message = codec::find("int3").err().unwrap().to_string();
    assert!(message.contains("int4_opt_v1") && message.contains("int3"), "{message}");
}

#[test]
fn bits_per_weight_are_what_is_stored() {
    for codec in codec::ALL {
        let (rows, cols) = (3, 4096);
        let stored: u64 = codec.layout.part_bytes(rows, cols).unwrap().iter().sum();
        let bits = stored as f64 * 8.0 / (rows * cols) as f64;
        let nominal = codec.layout.bits_per_weight();
        assert!(bits >= nominal && bits < nominal + 0.1, "{}: {bits} {nominal}", codec.name);
        assert_eq!(bits > nominal, codec.layout.has_row_parameters());
        let parts = encode(codec, &[3, 4096], 1, &gaussian(3 * 4096, 1)).parts;
        assert_eq!(parts.iter().map(|p| p.len() as u64).sum::<u64>(), stored);
    }
}

#[test]
fn every_instruction_set_gives_the_same_bits() {
    for codec in codec::ALL {
        for cols in [1, 7, 8, 15, 16, 17, 31, 32, 33, 64, 255, 256, 257, 300, 512, 1000] {
            let mut weights = gaussian(cols * 19, cols as u64);
            weights[..cols].fill(0.0);
            weights[cols..2 * cols].fill(-0.25);
            let importance: Vec<f32> = gaussian(cols, 5).iter().map(|x| x.abs() + 1e-4).collect();
            for importance in [None, Some(importance.as_slice())] {
                let strip = Strip { data: &weights, cols, importance };
                let run = |level: Level| {
                    let sizes = codec.layout.part_bytes(19, cols as u64).unwrap();
                    let mut parts: Vec<Vec<u8>> = sizes.iter().map(|&n| vec![0xA5; n as usize]).collect();
                    let mut slices: Vec<&mut [u8]> = parts.iter_mut().map(Vec::as_mut_slice).collect();
                    let range = (codec.encode)(level, strip, &mut slices);
                    let slices: Vec<&[u8]> = parts.iter().map(Vec::as_slice).collect();
                    let mut out = vec![f32::NAN; weights.len()];
                    (codec.layout.decode)(level, &slices, cols, &mut out);
                    let out: Vec<u32> = out.iter().map(|x| x.to_bits()).collect();
                    (range, parts, out)
                };
                let reference = run(Level::Portable);
                for level in Level::available() {
                    assert!(run(level) == reference, "{} {} columns {}", codec.name, cols, level.name());
                }
            }
        }
    }
}

#[test]
fn errors_are_small_and_measured_as_they_are() {
    for codec in codec::ALL {
        let weights = gaussian(64 * 1024, 3);
        let encoded = encode(codec, &[64, 1024], 1, &weights);
        let rebuilt = decode(codec, &[64, 1024], 1, &encoded);
        let measured = encoded.outcome.squared_error / encoded.outcome.squared_norm;
        let found = error(&weights, &rebuilt);
        assert!((measured / found - 1.0).abs() < 1e-9, "{}: {measured} {found}", codec.name);
        assert!(found < error_limit(codec), "{}: {found}", codec.name);
    }
}

#[test]
fn search_is_never_worse_than_min_max() {
    let find = |name| codec::find(name).unwrap();
    for (search, minmax) in [("int4_opt_v1", "int4_g16_fp16_v1"), ("int4_opt_llama_v1", "int4_g8_fp16_v1")] {
        for cols in [16, 40, 1024] {
            let weights: Vec<f32> = gaussian(64 * cols, 9).iter().map(|x| x * x * x).collect();
            let of = |codec| encode(codec, &[64, cols], 1, &weights).outcome.squared_error;
            assert!(of(find(search)) < of(find(minmax)), "{search} {cols}");
        }
    }
}

#[test]
fn importance_moves_the_error_to_where_it_matters_less() {
    for codec in codec::ALL.iter().filter(|c| c.encoder == "search") {
        let (rows, cols) = (64, 512);
        let weights = gaussian(rows * cols, 4);
        let importance: Vec<f32> = (0..cols).map(|c| if c % 3 == 0 { 30.0 } else { 1.0 }).collect();
        let tensor = runner::tensor_of(&[rows, cols], &weights);
        let weighted_error = |importance: Option<&[f32]>| {
            let encoded = runner::encode(&tensor, 1, codec, importance, false).unwrap();
            let rebuilt = decode(codec, &[rows, cols], 1, &encoded);
            let errors = weights.iter().zip(&rebuilt).enumerate();
            errors
                .map(|(i, (x, y))| f64::from((x - y) * (x - y)) * if i % cols % 3 == 0 { 30.0 } else { 1.0 })
                .sum::<f64>()
        };
        assert!(weighted_error(Some(&importance)) < 0.95 * weighted_error(None), "{}", codec.name);
    }
}

#[test]
fn min_max_is_the_plain_formula() {
    for (name, group) in [("int4_g8_fp16_v1", 8), ("int4_g16_fp16_v1", 16), ("int4_g32_fp16_v1", 32)] {
        let codec = codec::find(name).unwrap();
        let (rows, cols) = (5, 83);
        let weights = gaussian(rows * cols, 11);
        let parts = encode(codec, &[rows, cols], 1, &weights).parts;
        let groups = cols.div_ceil(group);
        let half = |part: &[u8], i: usize| f16::from_le_bytes([part[2 * i], part[2 * i + 1]]).to_f32();
        for (r, row) in weights.chunks(cols).enumerate() {
            for (g, x) in row.chunks(group).enumerate() {
                let (low, high) = x.iter().fold((f32::MAX, f32::MIN), |(l, h), &x| (l.min(x), h.max(x)));
                let scale = f16::from_f32((high - low) / 15.0).to_f32();
                let offset = f16::from_f32(low).to_f32();
                assert_eq!(half(&parts[1], r * groups + g), scale);
                assert_eq!(half(&parts[2], r * groups + g), offset);
                for (j, x) in x.iter().enumerate() {
                    let col = g * group + j;
                    let byte = parts[0][r * cols.div_ceil(2) + col / 2];
                    let q = if col % 2 == 0 { byte & 15 } else { byte >> 4 };
                    let wanted = if scale > 0.0 { ((x - offset) / scale).round_ties_even() } else { 0.0 };
                    assert_eq!(f32::from(q), wanted.clamp(0.0, 15.0), "{name} row {r} column {col}");
                }
            }
        }
    }
}

#[test]
fn any_axis_gives_what_its_transpose_gives() {
    for codec in codec::ALL {
        let (outer, cols, inner) = (2, 50, 70);
        let weights = gaussian(outer * cols * inner, 6);
        let encoded = encode(codec, &[outer, cols, inner], 1, &weights);
        let mut turned = vec![0.0; weights.len()];
        for o in 0..outer {
            for c in 0..cols {
                for i in 0..inner {
                    turned[(o * inner + i) * cols + c] = weights[(o * cols + c) * inner + i];
                }
            }
        }
        let straight = encode(codec, &[outer * inner, cols], 1, &turned);
        assert_eq!(encoded.parts, straight.parts, "{}", codec.name);
        let rebuilt = decode(codec, &[outer, cols, inner], 1, &encoded);
        let rebuilt_straight = decode(codec, &[outer * inner, cols], 1, &straight);
        for o in 0..outer {
            for c in 0..cols {
                for i in 0..inner {
                    let (a, b) = ((o * cols + c) * inner + i, (o * inner + i) * cols + c);
                    assert_eq!(rebuilt[a], rebuilt_straight[b]);
                }
            }
        }
    }
}

#[test]
fn empty_scalar_and_flat_tensors() {
    for codec in codec::ALL {
        for (shape, axis) in
            [(vec![0], 0), (vec![4, 0], 1), (vec![0, 4], 1), (vec![4, 0], 0), (vec![2, 0, 3], 2)]
        {
            let encoded = encode(codec, &shape, axis, &[]);
            assert!(decode(codec, &shape, axis, &encoded).is_empty(), "{} {shape:?}", codec.name);
        }
        for value in [0.0f32, 1.0, -3.5] {
            let encoded = encode(codec, &[], 0, &[value]);
            let rebuilt = decode(codec, &[], 0, &encoded)[0];
            assert!((rebuilt - value).abs() <= 0.02 * value.abs(), "{} {value} {rebuilt}", codec.name);
            let flat = vec![value; 3 * 40];
            let rebuilt = decode(codec, &[3, 40], 1, &encode(codec, &[3, 40], 1, &flat));
            assert!(
                rebuilt.iter().all(|r| (r - value).abs() <= 0.02 * value.abs()),
                "{} {value}",
                codec.name
            );
        }
    }
}

#[test]
fn magnitudes_beyond_fp16_are_scaled_and_survive() {
    for codec in codec::ALL {
        for scale in [1e-42f32, 1e-30, 1e-9, 1e-4, 1e4, 6e4, 1e6, 1e30, 3e37] {
            let weights: Vec<f32> = gaussian(32 * 256, 8).iter().map(|x| x * 40.0 * scale).collect();
            if weights.iter().any(|w| !w.is_finite()) {
                continue;
            }
            let encoded = encode(codec, &[32, 256], 1, &weights);
            let rebuilt = decode(codec, &[32, 256], 1, &encoded);
            assert!(rebuilt.iter().all(|w| w.is_finite()), "{} {scale}", codec.name);
            let limit = if scale < 1e-38 { 0.05 } else { error_limit(codec) };
            assert!(
                error(&weights, &rebuilt) < limit,
                "{} {scale}: {}",
                codec.name,
                error(&weights, &rebuilt)
            );
            assert_eq!(
                runner::exponent(&runner::tensor_of(&[32, 256], &weights), 1, codec).unwrap(),
                encoded.outcome.exponent
            );
        }
        let ordinary =
            encode(codec, &[32, 256], 1, &gaussian(32 * 256, 8).iter().map(|x| x * 5.0).collect::<Vec<_>>());
        assert_eq!(ordinary.outcome.exponent, 0);
    }
}

#[test]
fn nan_and_infinity_are_refused_with_their_index() {
    for codec in codec::ALL {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::from_bits(0xFFFF_FFFF)] {
            for at in [0, 5, 699, 1399] {
                let mut weights = gaussian(1400, 2);
                weights[at] = bad;
                for axis in [0, 1] {
                    let tensor = runner::tensor_of(&[20, 70], &weights);
                    let error = runner::encode(&tensor, axis, codec, None, true).unwrap_err();
                    let place = format!("[{}, {}]", at / 70, at % 70);
                    assert!(error.to_string().contains(&place), "{error} {place}");
                    assert_eq!(error.kind(), tenpak::Kind::Input);
                }
            }
        }
    }
}

#[test]
fn threads_do_not_matter() {
    for codec in codec::ALL {
        let weights = gaussian(600 * 700, 12);
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| encode(codec, &[600, 700], 1, &weights))
        };
        let one = run(1);
        for threads in [2, 7] {
            let many = run(threads);
            assert_eq!(one.parts, many.parts);
            assert_eq!(one.outcome.squared_error.to_bits(), many.outcome.squared_error.to_bits());
        }
    }
}

#[test]
fn half_precision_sources_and_targets() {
    let weights: Vec<f32> = gaussian(40 * 96, 13).iter().map(|w| f16::from_f32(*w).to_f32()).collect();
    let bytes: Vec<u8> = weights.iter().flat_map(|w| f16::from_f32(*w).to_le_bytes()).collect();
    let tensor = Tensor { shape: vec![40, 96], encoding: Encoding::Plain(Dtype::F16), bytes: bytes.into() };
    for codec in codec::ALL {
        for axis in [0, 1] {
            let encoded = runner::encode(&tensor, axis, codec, None, false).unwrap();
            assert_eq!(encoded.parts, encode(codec, &[40, 96], axis, &weights).parts);
            let parts: Vec<&[u8]> = encoded.parts.iter().map(Vec::as_slice).collect();
            let exact = decode(codec, &[40, 96], axis, &encoded);
            for dtype in [Dtype::F16, Dtype::BF16] {
                let mut out = vec![0; exact.len() * 2];
                let exponent = encoded.outcome.exponent;
                runner::decode(codec, exponent, &[40, 96], axis, &parts, dtype, &mut out).unwrap();
                let mut wanted = vec![0; exact.len() * 2];
                dtype.narrow(&exact, &mut wanted).unwrap();
                assert_eq!(out, wanted);
            }
        }
    }
}

#[test]
fn wrong_requests_are_refused() {
    let codec = &codec::ALL[0];
    let weights = gaussian(64, 1);
    let tensor = runner::tensor_of(&[4, 16], &weights);
    assert!(runner::encode(&tensor, 2, codec, None, false).is_err());
    assert!(runner::encode(&tensor, 1, codec, Some(&[1.0; 15]), false).is_err());
    assert!(runner::encode(&tensor, 1, codec, Some(&[-1.0; 16]), false).is_err());
    assert!(runner::encode_into(&tensor, 1, codec, runner::Options::default(), &mut [&mut [0; 3]]).is_err());
    let encoded = encode(codec, &[4, 16], 1, &weights);
    let parts: Vec<&[u8]> = encoded.parts.iter().map(Vec::as_slice).collect();
    let mut out = vec![0; 256];
    assert!(runner::decode(codec, 0, &[4, 15], 1, &parts, Dtype::F32, &mut out).is_err());
    assert!(runner::decode(codec, 0, &[4, 16], 1, &parts[..2], Dtype::F32, &mut out).is_err());
    assert!(runner::decode(codec, 0, &[4, 16], 1, &parts, Dtype::I32, &mut out).is_err());
    assert!(runner::decode(codec, 999, &[4, 16], 1, &parts, Dtype::F32, &mut out).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Any finite weights in any shape come back finite, and each within the codec's reach of its group.
    #[test]
    fn any_weights_in_any_shape(
        rows in 1usize..6,
        cols in 1usize..70,
        inner in 1usize..4,
        bits in proptest::collection::vec(any::<u32>(), 1..1300),
        spread in 0u32..3,
    ) {
        let shape = [rows, cols, inner];
        let weights: Vec<f32> = (0..rows * cols * inner)
            .map(|i| {
                // From any bits at all to numbers of like magnitude.
                let x = bits[i % bits.len()].rotate_left(i as u32 / bits.len() as u32);
                let x = match spread { 0 => x, 1 => x & 0x83FF_FFFF | 0x3800_0000, _ => x & 0x807F_FFFF | 0x3F00_0000 };
                let x = f32::from_bits(x);
                if x.is_finite() { x } else { 0.5 }
            })
            .collect();
        for codec in codec::ALL {
            for axis in 0..3 {
                let encoded = encode(codec, &shape, axis, &weights);
                let rebuilt = decode(codec, &shape, axis, &encoded);
                let largest = weights.iter().fold(0f32, |m, w| m.max(w.abs()));
                for (w, r) in weights.iter().zip(&rebuilt) {
                    prop_assert!(r.is_finite());
                    prop_assert!((w - r).abs() <= 0.2 * largest, "{} {w} {r}", codec.name);
                }
            }
        }
    }
}
