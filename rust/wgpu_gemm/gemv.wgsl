// Few tokens: a workgroup's threads share the columns of a few rows, QUADS times four, and add up at the end.
//
// A thread reads UNITS units of each quad before it uses the first, so that loads are in flight together, and reads
// its inputs once for all its rows.

var<workgroup> sums: array<vec4<f32>, {SUMS}>;

@compute @workgroup_size({THREADS})
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
#if SUBGROUPS
    @builtin(subgroup_id) subgroup: u32,
    @builtin(num_subgroups) subgroups: u32,
    @builtin(subgroup_invocation_id) lane: u32,
#endif
) {
    prepare(thread);
    let first_quad = workgroup.x * {QUADS}u;
    let first_token = workgroup.y * {TOKENS}u;
#for q in 0..QUADS
    // Past the last, the last again: its rows are computed twice and written once.
    let quad_{q} = min(first_quad + {q}u, sizes.quads - 1u);
    let rows_{q} = rows_of(quad_{q});
#for t in 0..TOKENS
    var sum_{q}_{t} = vec4(0.0);
#end
#end
#for t in 0..TOKENS
    let from_{t} = min(first_token + {t}u, sizes.tokens - 1u) * sizes.octets;
#end
    var octet = thread;
    for (; octet + {LAST_UNIT}u < sizes.octets; octet += {STEP}u) {
#for i in 0..UNITS
#for q in 0..QUADS
        let unit_{q}_{i} = fetch(quad_{q}, octet + {i}u * {THREADS}u);
#end
#end
#for i in 0..UNITS
#for t in 0..TOKENS
        let at_{i}_{t} = 2u * (from_{t} + octet + {i}u * {THREADS}u);
        let x_{i}_{t} = Eight(inputs[at_{i}_{t}], inputs[at_{i}_{t} + 1u]);
        let total_{i}_{t} = dot(x_{i}_{t}.low + x_{i}_{t}.high, vec4(1.0));
#end
#for q in 0..QUADS
#for r in 0..4
        let raw_{i}_{q}_{r} = raw_{r}(unit_{q}_{i}, rows_{q});
#for t in 0..TOKENS
        let dot_{i}_{q}_{r}_{t} = dot(raw_{i}_{q}_{r}.low, x_{i}_{t}.low) + dot(raw_{i}_{q}_{r}.high, x_{i}_{t}.high);
        sum_{q}_{t}[{r}] += sum_{r}(unit_{q}_{i}, rows_{q}, dot_{i}_{q}_{r}_{t}, total_{i}_{t});
#end
#end
#end
#end
    }
    for (; octet < sizes.octets; octet += {THREADS}u) {
#for t in 0..TOKENS
        let at_{t} = 2u * (from_{t} + octet);
        let x_{t} = Eight(inputs[at_{t}], inputs[at_{t} + 1u]);
        let total_{t} = dot(x_{t}.low + x_{t}.high, vec4(1.0));
#end
#for q in 0..QUADS
        let unit_{q} = fetch(quad_{q}, octet);
#for r in 0..4
        let raw_{q}_{r} = raw_{r}(unit_{q}, rows_{q});
#for t in 0..TOKENS
        let dot_{q}_{r}_{t} = dot(raw_{q}_{r}.low, x_{t}.low) + dot(raw_{q}_{r}.high, x_{t}.high);
        sum_{q}_{t}[{r}] += sum_{r}(unit_{q}, rows_{q}, dot_{q}_{r}_{t}, total_{t});
#end
#end
#end
    }
#if SUBGROUPS
#for q in 0..QUADS
#for t in 0..TOKENS
    sum_{q}_{t} = subgroupAdd(sum_{q}_{t});
    if lane == 0u {
        sums[subgroup * {SUMS_PER_THREAD}u + {q}u * {TOKENS}u + {t}u] = sum_{q}_{t};
    }
#end
#end
    workgroupBarrier();
    let parts = subgroups;
#else
#for q in 0..QUADS
#for t in 0..TOKENS
    sums[thread * {SUMS_PER_THREAD}u + {q}u * {TOKENS}u + {t}u] = sum_{q}_{t};
#end
#end
    workgroupBarrier();
    for (var half = {THREADS}u / 2u; half > 0u; half /= 2u) {
        if thread < half {
#for s in 0..SUMS_PER_THREAD
            sums[thread * {SUMS_PER_THREAD}u + {s}u] += sums[(thread + half) * {SUMS_PER_THREAD}u + {s}u];
#end
        }
        workgroupBarrier();
    }
    let parts = 1u;
#endif
    // A thread for each row and token.
    for (var out = thread; out < 4u * {SUMS_PER_THREAD}u; out += {THREADS}u) {
        let place = out / 4u;
        let row = out % 4u;
        let quad = first_quad + place / {TOKENS}u;
        let token = first_token + place % {TOKENS}u;
        if 4u * quad + row < sizes.slab_rows && token < sizes.tokens {
            var total = 0.0;
            for (var part = 0u; part < parts; part++) {
                total += sums[part * {SUMS_PER_THREAD}u + place][row];
            }
            total *= row_scales(rows_of(quad))[row] * sizes.scale;
            outputs[token * sizes.rows + sizes.first_row + 4u * quad + row] = total;
        }
    }
}
