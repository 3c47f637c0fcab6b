// Codes of four to six bits under one-byte scales and offsets: q*(s0 + u*ds) + (o0 + v*do).

@group(0) @binding(3) var<storage, read> codes: array<vec4<u32>>;   // [quads][octets], a word a row
@group(0) @binding(4) var<storage, read> params: array<vec2<u32>>;  // [quads][groups], u and v, a byte a row
@group(0) @binding(5) var<storage, read> lines: array<vec4<f32>>;   // [rows], (s0, ds, o0, do)
#if HIGH_BITS
// The bits above the fourth: [quads][octets][HIGH_BITS], four rows of eight codes.
@group(0) @binding(6) var<storage, read> high: array<u32>;
#endif

struct Unit {
    codes: vec4<u32>,
    params: vec2<u32>,
#for i in 0..HIGH_BITS
    high_{i}: u32,
#end
}
struct Rows {
#for r in 0..4
    line_{r}: vec4<f32>,
#end
}

fn prepare(thread: u32) {}
fn rows_of(quad: u32) -> Rows {
    let row = 4u * quad;
    return Rows(lines[row], lines[row + 1u], lines[row + 2u], lines[row + 3u]);
}
fn fetch(quad: u32, octet: u32) -> Unit {
    let place = quad * sizes.octets + octet;
    return Unit(
        codes[place],
        params[quad * sizes.groups + octet / ({GROUP}u / 8u)],
#for i in 0..HIGH_BITS
        high[place * {HIGH_BITS}u + {i}u],
#end
    );
}
#for r in 0..4
fn eight_{r}(unit: Unit, rows: Rows) -> Eight {
    let bytes = floats(vec4((unit.params >> vec2(8u * {r}u)) & vec2(255u), 0u, 0u));
    let line = rows.line_{r};
    let scale = fma(bytes.x, line.y, line.x);
    let offset = fma(bytes.y, line.w, line.z);
#if HIGH_BITS
    // Eight times HIGH_BITS bits of this row.
    let word = unit.codes[{r}];
    let above = unit.high_{r*HIGH_BITS/4} >> ({r}u * 8u * {HIGH_BITS}u % 32u);
    let places = vec4(0u, 1u, 2u, 3u) * {HIGH_BITS}u;
    let mask = vec4((1u << {HIGH_BITS}u) - 1u);
    let low = (vec4(word) >> vec4(0u, 4u, 8u, 12u)) & vec4(15u);
    let high = (vec4(word) >> vec4(16u, 20u, 24u, 28u)) & vec4(15u);
    let above_low = (vec4(above) >> places) & mask;
    let above_high = (vec4(above) >> (places + 4u * {HIGH_BITS}u)) & mask;
    return affine(Eight(floats(low | above_low << vec4(4u)), floats(high | above_high << vec4(4u))), scale, offset);
#else
    return affine(nibbles(unit.codes[{r}]), scale, offset);
#endif
}
#end
fn row_scales(rows: Rows) -> vec4<f32> {
    return vec4(1.0);
}
