// Signed bytes under one FP32 scale for each row: q*s.

@group(0) @binding(3) var<storage, read> codes: array<vec4<u32>>;  // [quads][octets][2], four codes a row, then four
@group(0) @binding(5) var<storage, read> lines: array<vec4<f32>>;  // [quads], a scale a row

struct Unit {
    low: vec4<u32>,
    high: vec4<u32>,
}
struct Rows {
    scales: vec4<f32>,
}

fn prepare(thread: u32) {}
fn rows_of(quad: u32) -> Rows {
    return Rows(lines[quad]);
}
fn fetch(quad: u32, octet: u32) -> Unit {
    let place = 2u * (quad * sizes.octets + octet);
    return Unit(codes[place], codes[place + 1u]);
}
#for r in 0..4
fn eight_{r}(unit: Unit, rows: Rows) -> Eight {
    return Eight(from_bytes(unit.low[{r}]), from_bytes(unit.high[{r}]));
}
fn bytes_{r}(unit: Unit) -> vec2<u32> {
    return vec2(unit.low[{r}], unit.high[{r}]);
}
fn sum_{r}(unit: Unit, rows: Rows, dot: f32, total: f32) -> f32 {
    return dot;
}
#end
fn row_scales(rows: Rows) -> vec4<f32> {
    return rows.scales;
}
