//! Any bytes as a safetensors file: refused or read, never a panic and never memory beyond what the file justifies.
#![no_main]

#[path = "../read_model.rs"]
mod read_model;

use libfuzzer_sys::fuzz_target;
use tenpak::input::Safetensors;

fuzz_target!(|data: &[u8]| {
    if let Ok(model) = Safetensors::from_bytes("fuzz", data.to_vec()) {
        read_model::read(&model, data.len());
    }
});
