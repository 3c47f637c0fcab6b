//! GGUF files, built piece by piece.

/// Writes a GGUF file piece by piece, right or wrong.
pub struct GgufFile {
    pub version: u32,
    pub pairs: Vec<Vec<u8>>,
    pub tensors: Vec<Vec<u8>>,
    pub counts: Option<(u64, u64)>,
    pub alignment: usize,
    pub data: Vec<u8>,
}

pub fn gguf() -> GgufFile {
    GgufFile { version: 3, pairs: vec![], tensors: vec![], counts: None, alignment: 32, data: vec![] }
}

pub fn string(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()
}

impl GgufFile {
    pub fn pair(mut self, key: &str, kind: u32, value: &[u8]) -> Self {
        self.pairs.push([&string(key)[..], &kind.to_le_bytes(), value].concat());
        self
    }

    pub fn describe(mut self, name: &str, dims: &[u64], kind: u32, offset: u64) -> Self {
        let mut t = string(name);
        t.extend((dims.len() as u32).to_le_bytes());
        dims.iter().for_each(|d| t.extend(d.to_le_bytes()));
        t.extend(kind.to_le_bytes());
        t.extend(offset.to_le_bytes());
        self.tensors.push(t);
        self
    }

    pub fn tensor(mut self, name: &str, dims: &[u64], kind: u32, bytes: &[u8]) -> Self {
        let offset = self.data.len().next_multiple_of(self.alignment);
        self.data.resize(offset, 0);
        self.data.extend(bytes);
        self.describe(name, dims, kind, offset as u64)
    }

    pub fn data(mut self, len: usize) -> Self {
        self.data = vec![0; len];
        self
    }

    pub fn bytes(&self) -> Vec<u8> {
        let (tensors, pairs) = self.counts.unwrap_or((self.tensors.len() as u64, self.pairs.len() as u64));
        let mut out = b"GGUF".to_vec();
        out.extend(self.version.to_le_bytes());
        out.extend(tensors.to_le_bytes());
        out.extend(pairs.to_le_bytes());
        out.extend(self.pairs.concat());
        out.extend(self.tensors.concat());
        out.resize(out.len().next_multiple_of(self.alignment), 0);
        out.extend(&self.data);
        out
    }
}
