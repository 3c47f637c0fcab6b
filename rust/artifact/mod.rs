//! placeholder
pub struct ArtifactFile;
