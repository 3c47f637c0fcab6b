//! What tests of every input share.

use tenpak::Kind;
use tenpak::input::Model;

/// Opening must fail with that kind, in one line that holds every one of `words`.
pub fn refused<T>(result: tenpak::Result<T>, kind: Kind, words: &[&str], case: &str) {
    let error = match result {
        Ok(_) => panic!("accepted: {case}"),
        Err(error) => error,
    };
    let message = error.to_string();
    assert_eq!(error.kind(), kind, "{case}: {message}");
    assert!(!message.contains('\n') && message.len() < 1000, "{case}: {message}");
    for word in words {
        assert!(message.contains(word), "{case}: {word:?} is not in: {message}");
    }
}

pub fn widened(model: &dyn Model, index: usize) -> Vec<f32> {
    let tensor = model.read(index).unwrap();
    let mut out = vec![0.0; tensor.len()];
    tensor.encoding.widen(&tensor.bytes, 0, &mut out);
    out
}
