// Four-bit codes that index one of four tables, under a byte (L, t) for each group and FP16 super-scales: d*L*T[t][q].

@group(0) @binding(3) var<storage, read> codes: array<vec4<u32>>;   // [quads][octets], a word a row
@group(0) @binding(4) var<storage, read> params: array<u32>;        // [quads][groups], a byte a row
@group(0) @binding(5) var<storage, read> lines: array<vec2<u32>>;   // [quads][supers], a half a row

// For every byte of codes the two signed bytes that it stands for, in each of the tables: [byte][REPLICAS][table]. One
// look-up serves two weights; with sixteen replicas two lanes of 32 share a bank, where at random three or four would.
#if SHORT
var<workgroup> pairs: array<u16, 1024 * {REPLICAS}>;
#else
var<workgroup> pairs: array<u32, 512 * {REPLICAS}>;
#endif
var<private> replica: u32;

struct Unit {
    codes: vec4<u32>,
    params: u32,
    supers: vec2<u32>,
}
struct Rows {
    none: u32,
}

fn entry(table: u32, code: u32) -> u32 {
    return (sizes.tables[table][code / 4u] >> (8u * (code % 4u))) & 255u;
}
fn pair(table: u32, byte: u32) -> u32 {
    return entry(table, byte % 16u) | entry(table, byte / 16u) << 8u;
}
fn prepare(thread: u32) {
    replica = thread % {REPLICAS}u;
    for (var byte = thread; byte < 256u; byte += {THREADS}u) {
        let low = pair(0u, byte) | pair(1u, byte) << 16u;
        let high = pair(2u, byte) | pair(3u, byte) << 16u;
        for (var i = 0u; i < {REPLICAS}u; i++) {
            // From another replica on in each lane, so that they write to different banks.
            let place = byte * {REPLICAS}u + (i + thread) % {REPLICAS}u;
#if SHORT
            pairs[4u * place] = u16(low & 0xffffu);
            pairs[4u * place + 1u] = u16(low >> 16u);
            pairs[4u * place + 2u] = u16(high & 0xffffu);
            pairs[4u * place + 3u] = u16(high >> 16u);
#else
            pairs[2u * place] = low;
            pairs[2u * place + 1u] = high;
#endif
        }
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
fn bytes_{r}(unit: Unit) -> vec2<u32> {
    let word = unit.codes[{r}];
    let byte_0 = extractBits(word, 0u, 8u);
    let byte_1 = extractBits(word, 8u, 8u);
    let byte_2 = extractBits(word, 16u, 8u);
    let byte_3 = word >> 24u;
#if SHORT
    let place = replica * 4u | ((unit.params >> (8u * {r}u + 6u)) & 3u);
#for i in 0..4
    let pair_{i} = u32(pairs[byte_{i} * {REPLICAS*4}u | place]);
#end
    return vec2(pair_0 | pair_1 << 16u, pair_2 | pair_3 << 16u);
#else
    let place = replica * 2u | ((unit.params >> (8u * {r}u + 7u)) & 1u);
    let shift = ((unit.params >> (8u * {r}u + 6u)) & 1u) * 16u;
#for i in 0..4
    let pair_{i} = pairs[byte_{i} * {REPLICAS*2}u | place] >> shift;
#end
    return vec2((pair_0 & 0xffffu) | pair_1 << 16u, (pair_2 & 0xffffu) | pair_3 << 16u);
#endif
}
fn eight_{r}(unit: Unit, rows: Rows) -> Eight {
    let bytes = bytes_{r}(unit);
    let scale = scale_{r}(unit);
    return Eight(from_bytes(bytes.x) * scale, from_bytes(bytes.y) * scale);
}
fn sum_{r}(unit: Unit, rows: Rows, dot: f32, total: f32) -> f32 {
    return dot * scale_{r}(unit);
}
#end
fn row_scales(rows: Rows) -> vec4<f32> {
    return vec4(1.0);
}
