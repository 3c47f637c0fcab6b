// Four-bit codes that index one of four tables, under a byte (L, t) for each group and FP16 super-scales: d*L*T[t][q].

@group(0) @binding(3) var<storage, read> codes: array<vec4<u32>>;   // [quads][octets], a word a row
@group(0) @binding(4) var<storage, read> params: array<u32>;        // [quads][groups], a byte a row
@group(0) @binding(5) var<storage, read> lines: array<vec2<u32>>;   // [quads][supers], a half a row

var<private> TABLES: array<f32, 64> = array({TABLES});

// For every byte of codes the two values that it stands for, as halves, which hold them exactly: one look-up serves
// two weights.
var<workgroup> pairs: array<u32, 1024>;

struct Unit {
    codes: vec4<u32>,
    params: u32,
    supers: vec2<u32>,
}
struct Rows {
    none: u32,
}

fn prepare(thread: u32) {
    for (var i = thread; i < 1024u; i += {THREADS}u) {
        let table = i / 256u * 16u;
        pairs[i] = pack2x16float(vec2(TABLES[table + i % 16u], TABLES[table + i / 16u % 16u]));
    }
    workgroupBarrier();
}
fn rows_of(quad: u32) -> Rows {
    return Rows(0u);
}
fn fetch(quad: u32, octet: u32) -> Unit {
    return Unit(
        codes[quad * sizes.octets + octet],
        params[quad * sizes.groups + octet / ({GROUP}u / 8u)],
        lines[quad * sizes.supers + octet / ({SUPER}u / 8u)],
    );
}
#for r in 0..4
// L is the signed number in the low six bits of a parameter, t the two above.
fn scale_{r}(unit: Unit) -> f32 {
    return unpack2x16float(unit.supers[{r}u / 2u])[{r}u % 2u] * f32(extractBits(i32(unit.params), 8u * {r}u, 6u));
}
fn raw_{r}(unit: Unit, rows: Rows) -> Eight {
    let table = extractBits(unit.params, 8u * {r}u + 6u, 2u) * 256u;
    let word = unit.codes[{r}];
    let a = unpack2x16float(pairs[table + (word & 255u)]);
    let b = unpack2x16float(pairs[table + ((word >> 8u) & 255u)]);
    let c = unpack2x16float(pairs[table + ((word >> 16u) & 255u)]);
    let d = unpack2x16float(pairs[table + (word >> 24u)]);
    return Eight(vec4(a, b), vec4(c, d));
}
fn eight_{r}(unit: Unit, rows: Rows) -> Eight {
    let raw = raw_{r}(unit, rows);
    let scale = scale_{r}(unit);
    return Eight(raw.low * scale, raw.high * scale);
}
fn sum_{r}(unit: Unit, rows: Rows, dot: f32, total: f32) -> f32 {
    return dot * scale_{r}(unit);
}
#end
fn row_scales(rows: Rows) -> vec4<f32> {
    return vec4(1.0);
}
