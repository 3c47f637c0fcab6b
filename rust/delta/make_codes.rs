//! stub
use super::make::{Made, Options};
use super::stored::Stored;
use crate::error::{Error, Result};
use crate::input::Model;
use crate::pipeline::Progress;
use std::path::Path;
pub(super) fn make(_: &dyn Stored, _: &dyn Model, _: &Path, _: &Options, _: Progress<'_>) -> Result<Made> {
    Err(Error::unsupported("codes"))
}
