// Four-bit codes under an FP16 scale and offset for each group: q*s + o.

@group(0) @binding(3) var<storage, read> codes: array<vec4<u32>>;   // [quads][octets], a word a row
@group(0) @binding(4) var<storage, read> params: array<vec4<u32>>;  // [quads][groups], (scale, offset) a row

struct Unit {
    codes: vec4<u32>,
    params: vec4<u32>,
}
struct Rows {
    none: u32,
}

fn prepare(thread: u32) {}
fn rows_of(quad: u32) -> Rows {
    return Rows(0u);
}
fn fetch(quad: u32, octet: u32) -> Unit {
    return Unit(codes[quad * sizes.octets + octet], params[quad * sizes.groups + octet / ({GROUP}u / 8u)]);
}
#for r in 0..4
fn eight_{r}(unit: Unit, rows: Rows) -> Eight {
    let pair = unpack2x16float(unit.params[{r}]);
    return affine(nibbles(unit.codes[{r}]), pair.x, pair.y);
}
fn bytes_{r}(unit: Unit) -> vec2<u32> {
    return nibble_bytes(unit.codes[{r}]);
}
fn sum_{r}(unit: Unit, rows: Rows, dot: f32, total: f32) -> f32 {
    let pair = unpack2x16float(unit.params[{r}]);
    return fma(pair.x, dot, pair.y * total);
}
#end
fn row_scales(rows: Rows) -> vec4<f32> {
    return vec4(1.0);
}
