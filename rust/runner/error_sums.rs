//! How far rebuilt weights are from the originals.

/// Σ(x - y)² and Σx², summed in an order that depends on the lengths alone.
pub fn error_sums(x: &[f32], y: &[f32]) -> [f64; 2] {
    const LANES: usize = 8;
    let (mut error, mut norm) = ([0f64; LANES], [0f64; LANES]);
    for (x, y) in x.chunks(LANES).zip(y.chunks(LANES)) {
        for (i, (&x, &y)) in x.iter().zip(y).enumerate() {
            let (x, y) = (f64::from(x), f64::from(y));
            error[i] += (x - y) * (x - y);
            norm[i] += x * x;
        }
    }
    [error.iter().sum(), norm.iter().sum()]
}
