//! Encode and decode speed of every codec in memory, one thread: `cargo bench --bench codecs [-- FILTER]`.
//!
//! Prints the median and the spread of several runs on a Gaussian matrix, beside a plain loop that reads and
//! writes as many bytes. The comparison with other tools is tests/bench/bench_codecs.py.

use std::hint::black_box;
use std::time::Instant;
use tenpak::codec;
use tenpak::codec::simd::Level;
use tenpak::runner;
use tenpak::tensor::Dtype;

const ROWS: usize = 4096;
const COLS: usize = 4096;
const RUNS: usize = 15;

fn gaussian(n: usize) -> Vec<f32> {
    let mut state = 0x9E37_79B9_7F4A_7C15u64;
    let mut uniform = move || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        ((state >> 40) as f32 + 0.5) / (1u64 << 24) as f32
    };
    (0..n)
        .map(|_| 0.02 * (-2.0 * uniform().ln()).sqrt() * (std::f32::consts::TAU * uniform()).cos())
        .collect()
}

fn seconds(mut f: impl FnMut()) -> (f64, f64) {
    f();
    let mut times: Vec<f64> = (0..RUNS)
        .map(|_| {
            let start = Instant::now();
            f();
            start.elapsed().as_secs_f64()
        })
        .collect();
    times.sort_by(f64::total_cmp);
    (times[RUNS / 2], (times[RUNS - 1] - times[0]) / times[RUNS / 2])
}

fn main() {
    let filter = std::env::args().nth(1).filter(|a| !a.starts_with("--")).unwrap_or_default();
    let threads = std::env::var("THREADS").ok().and_then(|t| t.parse().ok()).unwrap_or(1);
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a thread pool");
    let n = ROWS * COLS;
    let weights = gaussian(n);
    let tensor = runner::tensor_of(&[ROWS, COLS], &weights);
    println!("{ROWS} x {COLS} Gaussian FP32, {threads} thread(s), {}", Level::detect().name());

    // Plain copies of as many bytes: four floats become three bytes each way.
    let mut small = runner::zeroed(n * 3 / 4);
    let (t, _) = seconds(|| {
        for (o, w) in small.as_chunks_mut::<12>().0.iter_mut().zip(weights.as_chunks::<16>().0) {
            for (o, w) in o.iter_mut().zip(w) {
                *o = w.to_bits() as u8;
            }
        }
        black_box(&mut small);
    });
    println!("{:20} {:8.0} Mw/s", "read 4, write 0.75", n as f64 / t / 1e6);
    let mut large = runner::zeroed(n * 4);
    let (t, _) = seconds(|| {
        for (o, w) in large.as_chunks_mut::<64>().0.iter_mut().zip(small.as_chunks::<12>().0) {
            for o in o.as_chunks_mut::<4>().0 {
                *o = [w[0], w[4], w[7], w[11]];
            }
        }
        black_box(&mut large);
    });
    println!("{:20} {:8.0} Mw/s", "read 0.75, write 4", n as f64 / t / 1e6);

    pool.install(|| {
        for codec in codec::ALL.iter().filter(|c| c.name.contains(&filter)) {
            let mut encoded = runner::encode(&tensor, 1, codec, None, true).expect("encodes");
            let mut parts: Vec<&mut [u8]> = encoded.parts.iter_mut().map(Vec::as_mut_slice).collect();
            let (t, spread) = seconds(|| {
                runner::encode_into(&tensor, 1, codec, runner::Options::default(), &mut parts)
                    .expect("encodes");
            });
            let parts: Vec<&[u8]> = encoded.parts.iter().map(Vec::as_slice).collect();
            let (d, _) = seconds(|| {
                runner::decode(codec, 0, &[ROWS, COLS], 1, &parts, Dtype::F32, &mut large).expect("decodes");
            });
            println!(
                "{:20} {:8.1} Mw/s ±{:2.0} %  decode {:8.0} Mw/s  error {:.3}e-3",
                codec.name,
                n as f64 / t / 1e6,
                50.0 * spread,
                n as f64 / d / 1e6,
                1e3 * encoded.outcome.squared_error / encoded.outcome.squared_norm
            );
        }
    });
}
