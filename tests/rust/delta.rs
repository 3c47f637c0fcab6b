//! Deltas' coders: whatever the bits, they come back; whatever is damaged, it is refused without a panic.

mod support;

use std::path::Path;
use support::{numbers, small_artifact, tensor};
use tenpak::artifact::{ArtifactFile, Limits};
use tenpak::codec::{self, Per};
use tenpak::delta::exact::{self, CHUNK, Kind};
use tenpak::delta::{self, Content, Mode, Options, Trust, bit1, codes};
use tenpak::input::{self, Safetensors};
use tenpak::runner;
use tenpak::tensor::Dtype;

/// Bytes of every value, which look random and are the same on every machine.
fn noise(seed: u64, len: usize) -> Vec<u8> {
    numbers(seed).take(len).map(|x| x.to_bits() as u8 ^ (x.to_bits() >> 8) as u8).collect()
}

/// Every kind of relation between a base and what came of it, with the kinds of chunks that must come of it.
fn pairs(dtype: Dtype, elements: usize) -> Vec<(Vec<u8>, Vec<u8>, Option<Kind>)> {
    let size = dtype.size();
    let old = noise(1, elements * size);
    let mut few = old.clone();
    few.iter_mut().step_by(size * 997).for_each(|b| *b ^= 1);
    let mut all = old.clone();
    all.iter_mut().step_by(size).for_each(|b| *b ^= 1);
    let mut longer = few.clone();
    longer.extend(noise(2, 37 * size));
    let kind = |kind| (elements >= 4096).then_some(kind);
    vec![
        (old.clone(), old.clone(), kind(Kind::Same)),
        (old.clone(), few, kind(Kind::Sparse)),
        (old.clone(), all, None),
        (old.clone(), noise(3, elements * size), None),
        (Vec::new(), old.clone(), kind(Kind::Raw)),
        (Vec::new(), vec![0; elements * size], kind(Kind::Alone)),
        (old.clone(), longer, None),
        (old.clone(), old[..elements / 2 * size].to_vec(), None),
    ]
}

#[test]
fn exact_gives_back_every_bit_of_every_dtype() {
    for &dtype in Dtype::ALL {
        for elements in [0, 1, 5, 4096, CHUNK + 3] {
            for (old, new, kind) in pairs(dtype, elements) {
                let coded = exact::encode(&old, &new, dtype).unwrap();
                let mut back = vec![0xaa; new.len()];
                exact::decode(&coded.data, &old, dtype, &mut back).unwrap();
                assert!(back == new, "{} x {elements}", dtype.name());
                let same =
                    old.chunks(dtype.size()).zip(new.chunks(dtype.size())).filter(|(a, b)| a == b).count();
                assert_eq!(coded.changed as usize, new.len() / dtype.size() - same);
                if let Some(kind) = kind {
                    let chunks = exact::chunks(&coded.data, (new.len() / dtype.size()) as u64).unwrap();
                    // A last chunk of three elements may be smaller in another way.
                    assert_eq!(chunks[0].0, kind, "{}", dtype.name());
                }
                assert!(coded.data.len() <= new.len() + 5 * new.len().div_ceil(CHUNK * dtype.size()));
            }
        }
    }
}

#[test]
fn damaged_differences_are_refused_and_never_panic() {
    for (old, new, _) in pairs(Dtype::BF16, 5000) {
        let sound = exact::encode(&old, &new, Dtype::BF16).unwrap().data;
        let mut back = vec![0; new.len()];
        for cut in (0..sound.len()).step_by(1 + sound.len() / 200) {
            assert!(exact::decode(&sound[..cut], &old, Dtype::BF16, &mut back).is_err());
        }
        for bit in (0..sound.len() * 8).step_by(1 + sound.len() / 50) {
            let mut damaged = sound.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            // Some damage gives other numbers, which the digest of the result finds.
            let _ = exact::decode(&damaged, &old, Dtype::BF16, &mut back);
            let _ = exact::decode(&damaged, &[], Dtype::BF16, &mut back);
        }
    }
}

#[test]
fn bit1_refuses_what_it_cannot_scale_and_parts_that_do_not_fit() {
    let (old, new) = (tensor(1, &[3, 37], Dtype::F32), tensor(2, &[3, 37], Dtype::F32));
    let shape = [3, 37];
    let coded = bit1::encode(&old.bytes, &new.bytes, Dtype::F32, &shape).unwrap();
    assert_eq!((coded.signs.len(), coded.scales.len()), (3 * 5, 3 * 2));
    let mut back = vec![0; new.bytes.len()];
    bit1::decode(&coded.signs, &coded.scales, &old.bytes, Dtype::F32, &shape, &mut back).unwrap();
    for (signs, scales) in [(&coded.signs[1..], &coded.scales[..]), (&coded.signs, &coded.scales[2..])] {
        assert!(bit1::decode(signs, scales, &old.bytes, Dtype::F32, &shape, &mut back).is_err());
    }
    let mut infinite = new.bytes.to_vec();
    infinite[..4].copy_from_slice(&f32::INFINITY.to_le_bytes());
    assert_eq!(bit1::encode(&old.bytes, &infinite, Dtype::F32, &shape), None);
}

/// A law over the table: a model that is its base's own weights comes out as the base, part by part.
#[test]
fn every_layout_gives_back_its_own_parts_and_follows_a_change() {
    for codec in codec::ALL {
        for (shape, axis) in [([48, 80], 1), ([80, 48], 0)] {
            let base = tensor(5, &shape, Dtype::F32);
            let encoded = runner::encode(&base, axis, codec, None, false).unwrap();
            let parts: Vec<&[u8]> = encoded.parts.iter().map(Vec::as_slice).collect();
            let exponent = encoded.outcome.exponent;
            let again = codes::recode(&base, axis, exponent, codec, None, &parts).unwrap();
            assert_eq!(again.changed, 0, "{}", codec.name);
            assert!(again.parts == encoded.parts, "{}", codec.name);

            let mut moved = base.clone();
            for (bytes, change) in moved.bytes.to_mut().as_chunks_mut::<4>().0.iter_mut().zip(numbers(9)) {
                *bytes = (f32::from_le_bytes(*bytes) + change / 512.0).to_le_bytes();
            }
            let fresh = runner::encode(&moved, axis, codec, None, true).unwrap().outcome;
            let near = codes::recode(&moved, axis, exponent, codec, None, &parts).unwrap();
            assert!(
                near.error <= 1.05 * fresh.squared_error,
                "{}: {} {}",
                codec.name,
                near.error,
                fresh.squared_error
            );
            let codes = codec.layout.parts.iter().filter(|p| matches!(p.per, Per::Weight(_))).count();
            assert!(codes > 0 && near.changed > 0 && near.changed < 48 * 80 / 2, "{}", codec.name);
        }
    }
}

#[test]
fn a_delta_is_an_artifact_that_needs_its_base() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    small_artifact(&at("base.tenpak"));
    let artifact = ArtifactFile::open(&at("base.tenpak")).unwrap();
    let content = delta::open(&[at("base.tenpak")], Trust::Nothing).unwrap();
    assert_eq!(content.identity, Some(artifact.root()));
    let model = content.content.into_model().unwrap();
    // The base's own floats, of which nothing changed.
    let options = Options { mode: Mode::Exact, threads: 2, force: false };
    let made =
        delta::delta(&[at("base.tenpak")], &*model, &at("d.tenpak"), &options, &|_, _| Ok(())).unwrap();
    assert!(made.tensors.iter().all(|t| t.method == "same" && t.bytes == 0));
    let file = ArtifactFile::open(&at("d.tenpak")).unwrap();
    assert_eq!(file.delta().unwrap().base, artifact.root());
    let mut out = vec![0; 4 * file.tensors()[0].elements() as usize];
    let refused = file.decode(&file.tensors()[0], Dtype::F32, &mut out).unwrap_err();
    assert!(refused.to_string().contains("base is needed"), "{refused}");
    assert!(delta::delta(&[at("base.tenpak")], &*model, &at("d.tenpak"), &options, &|_, _| Ok(())).is_err());

    let chain = delta::open(&[at("base.tenpak"), at("d.tenpak")], Trust::Nothing).unwrap();
    let Content::Model(applied) = chain.content else { panic!("exact deltas give models") };
    assert_eq!(Some(input::digest(&*applied).unwrap()), chain.identity);
}

/// The header says what the index says: neither alone makes a file a delta.
#[test]
fn the_header_and_the_index_agree_on_what_a_file_is() {
    use support::reseal::reseal_header;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.tenpak");
    small_artifact(&path);
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[16] = 1;
    reseal_header(&mut bytes);
    let refused = ArtifactFile::from_bytes(bytes, &Limits::default()).unwrap_err();
    assert!(refused.to_string().contains("disagree"), "{refused}");
}

#[test]
fn progress_can_end_the_work_and_nothing_is_left() {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/tiny-llama/model.safetensors");
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("d.tenpak");
    let model = Safetensors::open(&data).unwrap();
    let options = Options { mode: Mode::Exact, threads: 1, force: false };
    let stop = |_: u64, _: u64| Err(tenpak::Error::new(tenpak::Kind::Interrupted, "enough"));
    let refused = delta::delta(&[data], &model, &target, &options, &stop).unwrap_err();
    assert_eq!(refused.kind(), tenpak::Kind::Interrupted);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}
