//! Any bytes as the differences of a tensor: refused or read, never a panic; and any two tensors come back exactly.
//!
//! The first byte chooses the dtype and how the rest is used, the second how many elements there are.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tenpak::delta::exact;
use tenpak::tensor::Dtype;

fuzz_target!(|data: &[u8]| {
    let [how, count, rest @ ..] = data else { return };
    let dtypes = [Dtype::BF16, Dtype::F32, Dtype::U8, Dtype::F64, Dtype::F16, Dtype::F8_E4M3, Dtype::I16, Dtype::I64];
    let dtype = dtypes[usize::from(how & 7)];
    let size = dtype.size();
    if how & 8 == 0 {
        let len = usize::from(*count) * 3 * size;
        let old: Vec<u8> = (0..len).map(|i| (i * i >> 3) as u8).collect();
        let mut new = vec![0; len];
        // Odd choices have no base for the last elements, or none at all.
        let old = if how & 16 == 0 { &old[..] } else { &old[..len / 2 / size * size] };
        let _ = exact::decode(rest, old, dtype, &mut new);
        // A sound head in front of the fuzzer's own bytes, so that it need not find one.
        let mut chunk = vec![how >> 5];
        chunk.extend_from_slice(&(rest.len() as u32).to_le_bytes());
        chunk.extend_from_slice(rest);
        let _ = exact::decode(&chunk, old, dtype, &mut new);
        return;
    }
    let (old, new) = rest.split_at(rest.len() * usize::from(*count) / 256 / size * size);
    let new = &new[..new.len() / size * size];
    let coded = exact::encode(old, new, dtype).unwrap();
    let mut back = vec![0; new.len()];
    exact::decode(&coded.data, old, dtype, &mut back).unwrap();
    assert!(back == new);
});
