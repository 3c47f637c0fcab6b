use std::time::Instant;
use tenpak::delta::exact;
use tenpak::input;
#[test]
fn speed() {
    let base = input::open("/tmp/delta-ft/base".as_ref()).unwrap();
    for name in ["full", "lora", "five"] {
        let ft = input::open(format!("/tmp/delta-ft/{name}").as_ref()).unwrap();
        for threads in [1, 2] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let (mut total, mut out, mut te, mut td) = (0, 0, 0.0, 0.0);
                let mut by = std::collections::BTreeMap::new();
                let start = Instant::now();
                input::digest(&*base).unwrap();
                let th = start.elapsed().as_secs_f64();
                for (i, info) in ft.tensors().iter().enumerate() {
                    let new = ft.read(i).unwrap();
                    let old = base.read(base.tensors().iter().position(|t| t.name == info.name).unwrap()).unwrap();
                    let start = Instant::now();
                    let e = exact::encode(&old.bytes, &new.bytes, info.encoding.dtype()).unwrap();
                    te += start.elapsed().as_secs_f64();
                    let mut back = vec![0; new.bytes.len()];
                    let start = Instant::now();
                    exact::decode(&e.data, &old.bytes, info.encoding.dtype(), &mut back).unwrap();
                    td += start.elapsed().as_secs_f64();
                    assert!(back == *new.bytes);
                    total += back.len();
                    out += e.data.len();
                    for (k, c) in exact::chunks(&e.data, (back.len() / 2) as u64).unwrap() {
                        *by.entry(k.name()).or_insert(0) += c.len();
                    }
                }
                println!("{name} {threads}: {:.4} of {total}, enc {:.2} GB/s dec {:.2} GB/s hash {:.2} {by:?}",
                    out as f64 / total as f64, total as f64 / 1e9 / te, total as f64 / 1e9 / td, total as f64/1e9/th);
            });
        }
    }
}
