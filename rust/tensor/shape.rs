//! Element counts that cannot overflow.

use crate::error::{Error, Result};

/// The most dimensions a tensor may have.
pub const MAX_RANK: usize = 8;

/// Products of extents stay below this.
pub const MAX_ELEMENTS: u64 = 1 << 56;

/// The product of the extents, checked against [`MAX_RANK`] and [`MAX_ELEMENTS`].
///
/// # Errors
/// An input error that states the shape, without a place: callers add it with [`Error::at`].
pub fn element_count(shape: &[u64]) -> Result<u64> {
    if shape.len() > MAX_RANK {
        return Err(Error::input(format!("{} dimensions; at most {MAX_RANK} are allowed", shape.len())));
    }
    // An extent of zero must not hide an absurd product of the others.
    let mut count: u64 = 1;
    for &extent in shape {
        count = count
            .checked_mul(extent.max(1))
            .filter(|&n| n < MAX_ELEMENTS)
            .ok_or_else(|| Error::input(format!("shape {shape:?} has 2^56 elements or more")))?;
    }
    Ok(if shape.contains(&0) { 0 } else { count })
}
