//! Any bytes as a JSON bundle file: refused or read, never a panic and never memory beyond what the file justifies.
#![no_main]

#[path = "../read_model.rs"]
mod read_model;

use libfuzzer_sys::fuzz_target;
use tenpak::input::Bundle;

fuzz_target!(|data: &[u8]| {
    if let Ok(model) = Bundle::from_bytes("fuzz", data.to_vec()) {
        read_model::read(&model, data.len());
    }
});
