//! stub
use super::stored::Stored;
use crate::artifact::{ArtifactFile, Entry};
use crate::error::{Error, Result};
use crate::input::Sidecar;
use std::borrow::Cow;
pub struct Recoded;
impl Recoded {
    pub fn new(_: ArtifactFile, _: Box<dyn Stored>) -> Result<Recoded> { Err(Error::unsupported("codes")) }
}
impl Stored for Recoded {
    fn root(&self) -> [u8; 32] { todo!() }
    fn about(&self) -> (&str, &str) { todo!() }
    fn entries(&self) -> &[Entry] { todo!() }
    fn parts(&self, _: usize) -> Result<Vec<Cow<'_, [u8]>>> { todo!() }
    fn aliases(&self) -> &std::collections::BTreeMap<String, String> { todo!() }
    fn files(&self) -> Result<Vec<Sidecar>> { todo!() }
    fn paths(&self) -> Vec<std::path::PathBuf> { todo!() }
}
