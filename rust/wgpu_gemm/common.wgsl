// What every kernel shares: the sizes of a product, and floats from codes.
//
// A weight [n, k] lies in units of four rows by eight columns, [quads][octets], so that sixteen bytes are one load
// for four-bit codes, a lane's columns are the same for all its rows, and neighbouring lanes read neighbouring units
// and neighbouring inputs. Preludes say what a unit holds, kernels what is done with it:
// eight_r is the weights of row r; raw_r what is multiplied with inputs instead, where few are, and sum_r what the sum of
// those products, and that of the inputs, make of the weights' product.

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
}

@group(0) @binding(0) var<uniform> sizes: Sizes;
@group(0) @binding(1) var<storage, read> inputs: array<vec4<f32>>;    // [tokens][2 * octets]
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

// The same as 1 + q / 16, from their bits alone.
fn sixteenths(word: u32) -> Eight {
    let low = vec4(word << 19u, word << 15u, word << 11u, word << 7u) & vec4(0x00780000u) | vec4(0x3f800000u);
    let high = vec4(word << 3u, word >> 1u, word >> 5u, word >> 9u) & vec4(0x00780000u) | vec4(0x3f800000u);
    return Eight(bitcast<vec4<f32>>(low), bitcast<vec4<f32>>(high));
}
// The sum of x (q s + o), from those of x (1 + q / 16) and of x.
fn affine_sum(dot: f32, total: f32, scale: f32, offset: f32) -> f32 {
    return fma(16.0 * scale, dot - total, offset * total);
}

fn affine(q: Eight, scale: f32, offset: f32) -> Eight {
    return Eight(fma(q.low, vec4(scale), vec4(offset)), fma(q.high, vec4(scale), vec4(offset)));
}
