// What every kernel shares: the sizes of a product, and floats from codes.
//
// A weight [n, k] lies in units of four rows by eight columns, [quads][octets], so that sixteen bytes are one load
// for four-bit codes, a lane's columns are the same for all its rows, and neighbouring lanes read neighbouring units
// and neighbouring inputs. Preludes say what a unit holds, kernels what is done with it:
// eight_r is the weights of row r. Where tokens are few, bytes_r is its codes instead, as signed bytes, and sum_r is what
// the sum of their products with inputs, and that of the inputs, make of the weights' product.

struct Sizes {
    tokens: u32,
    rows: u32,       // of y
    first_row: u32,  // of this slab in y
    slab_rows: u32,
    octets: u32,     // of a row, padded
    quads: u32,      // of this slab
    groups: u32,     // parameters of a row
    supers: u32,     // and those of the second kind
    scale: f32,        // of outputs: 2^exponent / input_scale
    input_scale: f32,  // of inputs in half precision
    per_group: u32,    // quads of a workgroup
    tables: array<vec4<u32>, 4>,  // that codes index, sixteen signed bytes each
}

@group(0) @binding(0) var<uniform> sizes: Sizes;
@group(0) @binding(2) var<storage, read_write> outputs: array<f32>;   // [tokens][rows]

struct Eight {
    low: vec4<f32>,
    high: vec4<f32>,
}

// Four small integers as floats.
fn floats(q: vec4<u32>) -> vec4<f32> {
#if MAGIC
    // The bits of 2^23 + q, exactly: conversions run at a quarter of an addition's speed on some GPUs.
    return bitcast<vec4<f32>>(q | vec4(0x4b000000u)) - 8388608.0;
#else
    return vec4<f32>(q);
#endif
}

// The eight codes of a word of nibbles, lowest first.
fn nibbles(word: u32) -> Eight {
    let low = vec4(word, word >> 4u, word >> 8u, word >> 12u) & vec4(15u);
    let high = vec4(word >> 16u, word >> 20u, word >> 24u, word >> 28u) & vec4(15u);
    return Eight(floats(low), floats(high));
}

// The same as bytes: those of even columns, then those of odd ones.
fn nibble_bytes(word: u32) -> vec2<u32> {
    return vec2(word & 0x0f0f0f0fu, (word >> 4u) & 0x0f0f0f0fu);
}

// Four signed bytes as floats: with their top bits flipped, they are 0..255.
fn from_bytes(word: u32) -> vec4<f32> {
    let bytes = vec4(word, word >> 8u, word >> 16u, word >> 24u) ^ vec4(128u);
    return floats(bytes & vec4(255u)) - 128.0;
}

fn affine(q: Eight, scale: f32, offset: f32) -> Eight {
    return Eight(fma(q.low, vec4(scale), vec4(offset)), fma(q.high, vec4(scale), vec4(offset)));
}
