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
// A group's scale and offset.
fn pair_{r}(unit: Unit, rows: Rows) -> vec2<f32> {
    let bytes = floats(vec4((unit.params >> vec2(8u * {r}u)) & vec2(255u), 0u, 0u));
    let line = rows.line_{r};
    return vec2(fma(bytes.x, line.y, line.x), fma(bytes.y, line.w, line.z));
}
#if HIGH_BITS
fn codes_{r}(unit: Unit) -> Eight {
    // Eight times HIGH_BITS bits of this row.
    let word = unit.codes[{r}];
    let above = unit.high_{r*HIGH_BITS/4} >> ({r}u * 8u * {HIGH_BITS}u % 32u);
    let places = vec4(0u, 1u, 2u, 3u) * {HIGH_BITS}u;
    let mask = vec4((1u << {HIGH_BITS}u) - 1u);
    let low = (vec4(word) >> vec4(0u, 4u, 8u, 12u)) & vec4(15u);
    let high = (vec4(word) >> vec4(16u, 20u, 24u, 28u)) & vec4(15u);
    let above_low = (vec4(above) >> places) & mask;
    let above_high = (vec4(above) >> (places + 4u * {HIGH_BITS}u)) & mask;
    return Eight(floats(low | above_low << vec4(4u)), floats(high | above_high << vec4(4u)));
}
#else
fn codes_{r}(unit: Unit) -> Eight {
    return nibbles(unit.codes[{r}]);
}
#endif
fn eight_{r}(unit: Unit, rows: Rows) -> Eight {
    let pair = pair_{r}(unit, rows);
    return affine(codes_{r}(unit), pair.x, pair.y);
}
fn bytes_{r}(unit: Unit) -> vec2<u32> {
    var bytes = nibble_bytes(unit.codes[{r}]);
#if HIGH_BITS
    let above = unit.high_{r*HIGH_BITS/4} >> ({r}u * 8u * {HIGH_BITS}u % 32u);
#for j in 0..4
    let both_{j} = above >> ({j}u * 2u * {HIGH_BITS}u);
    bytes |= (vec2(both_{j}, both_{j} >> {HIGH_BITS}u) & vec2((1u << {HIGH_BITS}u) - 1u)) << vec2(8u * {j}u + 4u);
#end
#endif
    return bytes;
}
fn sum_{r}(unit: Unit, rows: Rows, dot: f32, total: f32) -> f32 {
    let pair = pair_{r}(unit, rows);
    return fma(pair.x, dot, pair.y * total);
}
#end
fn row_scales(rows: Rows) -> vec4<f32> {
    return vec4(1.0);
}
