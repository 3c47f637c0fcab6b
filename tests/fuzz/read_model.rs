//! Reads every tensor of a model that was accepted, and holds the reader to what it promises.

use tenpak::input::Model;

/// The first elements of each tensor that are widened.
const MOST: usize = 64;

pub fn read(model: &dyn Model, input_bytes: usize) {
    let mut names = std::collections::HashSet::new();
    for (i, info) in model.tensors().iter().enumerate() {
        assert!(names.insert(&info.name), "{} stands twice", info.name);
        let tensor = model.read(i).expect("what was accepted is read");
        assert_eq!(tensor.shape, info.shape);
        assert_eq!(tensor.encoding.byte_len(tensor.len() as u64), Some(tensor.bytes.len() as u64));
        // A number takes two characters at least, and becomes four bytes at most; a transposed block of 84 bytes 1024.
        assert!(tensor.bytes.len() <= 13 * input_bytes);
        if tensor.encoding.dtype().is_weight() {
            let n = tensor.len().min(MOST);
            let mut out = [0f32; MOST];
            tensor.encoding.widen(&tensor.bytes, 0, &mut out[..n]);
            tensor.encoding.widen(&tensor.bytes, tensor.len() - n, &mut out[..n]);
        }
    }
    let sidecars = model.sidecars().expect("what was accepted is read");
    for sidecar in sidecars {
        serde_json::from_slice::<serde_json::Value>(&sidecar.bytes).expect("sidecars of one file are JSON");
        // A character that JSON escapes takes six bytes, in each of up to 16 merges of its token.
        assert!(sidecar.bytes.len() <= 4096 + 128 * input_bytes);
    }
}
