// Many tokens: a workgroup computes 64 rows for TOKENS tokens, tile by tile of COLUMNS columns.
//
// Weights are rebuilt once for all tokens into workgroup memory, [column][row], beside the inputs, [column][token];
// each thread then keeps a block of 4 rows by 8 tokens in registers, and three loads serve 32 products.

@group(0) @binding(1) var<storage, read> inputs: array<vec4<f32>>;  // [tokens][2 * octets]

const ROW_QUADS = 16u;
const TOKEN_QUADS = {TOKENS}u / 4u;
const TOKEN_OCTETS = {TOKENS}u / 8u;
const OCTETS = {COLUMNS}u / 8u;
const THREADS = {THREADS}u;

alias Tile = vec4<{TILE}>;
var<workgroup> weights: array<Tile, {COLUMNS}u * ROW_QUADS>;
var<workgroup> tokens: array<Tile, {COLUMNS}u * TOKEN_QUADS>;

@compute @workgroup_size({THREADS})
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    prepare(thread);
    let first_quad = workgroup.x * ROW_QUADS;
    let first_token = workgroup.y * {TOKENS}u;
    let quad = thread % ROW_QUADS;
    let token_octet = thread / ROW_QUADS;
#for t in 0..8
    var sum_{t} = vec4(0.0);
#end
    for (var first_octet = 0u; first_octet < sizes.octets; first_octet += OCTETS) {
        for (var i = thread; i < ROW_QUADS * OCTETS; i += THREADS) {
            let here = min(first_quad + i % ROW_QUADS, sizes.quads - 1u);
            let octet = i / ROW_QUADS;
            // Columns past the last meet inputs of zero; the last column's weights are as good as any.
            let unit = fetch(here, min(first_octet + octet, sizes.octets - 1u));
            let rows = rows_of(here);
            let a = eight_0(unit, rows);
            let b = eight_1(unit, rows);
            let c = eight_2(unit, rows);
            let d = eight_3(unit, rows);
            let to = 8u * octet * ROW_QUADS + i % ROW_QUADS;
#for j in 0..4
            weights[to + {j}u * ROW_QUADS] = Tile(vec4(a.low[{j}], b.low[{j}], c.low[{j}], d.low[{j}]));
            weights[to + (4u + {j}u) * ROW_QUADS] = Tile(vec4(a.high[{j}], b.high[{j}], c.high[{j}], d.high[{j}]));
#end
        }
        for (var i = thread; i < {TOKENS}u * OCTETS; i += THREADS) {
            let token = i % {TOKENS}u;
            let octet = i / {TOKENS}u;
            var x = Eight(vec4(0.0), vec4(0.0));
            if first_token + token < sizes.tokens && first_octet + octet < sizes.octets {
                let at = 2u * ((first_token + token) * sizes.octets + first_octet + octet);
                x = Eight(inputs[at] * sizes.input_scale, inputs[at + 1u] * sizes.input_scale);
            }
            let to = 8u * octet * TOKEN_QUADS + token / 4u;
#for j in 0..4
            tokens[to + {j}u * TOKEN_QUADS][token % 4u] = {TILE}(x.low[{j}]);
            tokens[to + (4u + {j}u) * TOKEN_QUADS][token % 4u] = {TILE}(x.high[{j}]);
#end
        }
        workgroupBarrier();
        for (var octet = 0u; octet < OCTETS; octet++) {
#if HALF
            // Eight products are added up in half precision, and their sums in full.
#for t in 0..8
            var part_{t} = Tile();
#end
#endif
#for j in 0..8
            let w_{j} = weights[(8u * octet + {j}u) * ROW_QUADS + quad];
            let x_{j} = tokens[(8u * octet + {j}u) * TOKEN_QUADS + 2u * token_octet];
            let z_{j} = tokens[(8u * octet + {j}u) * TOKEN_QUADS + 2u * token_octet + 1u];
#for t in 0..4
#if HALF
            part_{t} = fma(w_{j}, Tile(x_{j}[{t}]), part_{t});
            part_{t+4} = fma(w_{j}, Tile(z_{j}[{t}]), part_{t+4});
#else
            sum_{t} = fma(w_{j}, Tile(x_{j}[{t}]), sum_{t});
            sum_{t+4} = fma(w_{j}, Tile(z_{j}[{t}]), sum_{t+4});
#endif
#end
#end
#if HALF
#for t in 0..8
            sum_{t} += vec4<f32>(part_{t});
#end
#endif
        }
        workgroupBarrier();
    }
    let row = 4u * (first_quad + quad);
    if row < sizes.slab_rows {
        let scales = row_scales(rows_of(first_quad + quad)) * sizes.scale;
        let left = sizes.slab_rows - row;
#for t in 0..8
        write(first_token + 8u * token_octet + {t}u, row, left, sum_{t} * scales);
#end
    }
}

fn write(token: u32, row: u32, left: u32, y: vec4<f32>) {
    if token < sizes.tokens {
        let to = token * sizes.rows + sizes.first_row + row;
        outputs[to] = y.x;
        if left > 1u { outputs[to + 1u] = y.y; }
        if left > 2u { outputs[to + 2u] = y.z; }
        if left > 3u { outputs[to + 3u] = y.w; }
    }
}
