// Few tokens: sums of codes times digits of inputs, four to an instruction.
//
// SPLIT subgroups of a workgroup, or all of its threads where there are no subgroups, share the columns of QUADS times four
// rows, and add up at the end. A thread reads UNITS units of each quad before it uses the first, so that loads are in
// flight together, and reads its inputs once for all its rows.

// Digits of eight inputs: [tokens][2][octets], see digits.rs.
@group(0) @binding(1) var<storage, read> inputs: array<vec4<u32>>;

struct Digits {
    first: vec4<u32>,
    second: vec4<u32>,
}

fn digits_at(place: u32) -> Digits {
    return Digits(inputs[place], inputs[place + sizes.octets]);
}
fn total(x: Digits) -> f32 {
    return bitcast<f32>(x.second.w);
}
// The sum of eight products.
fn products(bytes: vec2<u32>, x: Digits) -> f32 {
    let high = dot4I8Packed(bytes.x, x.first.x) + dot4I8Packed(bytes.y, x.first.y);
    let middle = dot4I8Packed(bytes.x, x.first.z) + dot4I8Packed(bytes.y, x.first.w);
    let low = dot4I8Packed(bytes.x, x.second.x) + dot4I8Packed(bytes.y, x.second.y);
    return f32(high * 65536 + middle * 256 + low) * bitcast<f32>(x.second.z);
}

#if SHARED
var<workgroup> sums: array<vec4<f32>, {SUMS}>;
#endif

@compute @workgroup_size({THREADS})
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
#if SUBGROUPS
    @builtin(subgroup_id) subgroup: u32,
    @builtin(num_subgroups) subgroups: u32,
    @builtin(subgroup_invocation_id) lane: u32,
    @builtin(subgroup_size) lanes: u32,
#endif
) {
    prepare(thread);
    let first_token = workgroup.y * {TOKENS}u;
#for t in 0..TOKENS
    let from_{t} = 2u * min(first_token + {t}u, sizes.tokens - 1u) * sizes.octets;
#end
#if SUBGROUPS
    // Teams of subgroups, and members of a team.
    let split = min({SPLIT}u, subgroups);
    let teams = subgroups / split;
    let team = subgroup / split;
    let members = split * lanes;
    let member = subgroup % split * lanes + lane;
#else
    let split = 1u;
    let teams = 1u;
    let team = 0u;
    let members = {THREADS}u;
    let member = thread;
#endif
    let end_quad = min((workgroup.x + 1u) * sizes.per_group, sizes.quads);
    for (var base = workgroup.x * sizes.per_group; base < end_quad; base += teams * {QUADS}u) {
        let first_quad = base + team * {QUADS}u;
#for q in 0..QUADS
        // Past the last, the last again: its rows are computed twice and written once.
        let quad_{q} = min(first_quad + {q}u, sizes.quads - 1u);
        let rows_{q} = rows_of(quad_{q});
#for t in 0..TOKENS
        var sum_{q}_{t} = vec4(0.0);
#end
#end
        var octet = member;
        for (; octet + {LAST}u * members < sizes.octets; octet += {UNITS}u * members) {
#for i in 0..UNITS
#for q in 0..QUADS
            let unit_{q}_{i} = fetch(quad_{q}, octet + {i}u * members);
#end
#end
#for i in 0..UNITS
#for t in 0..TOKENS
            let x_{i}_{t} = digits_at(from_{t} + octet + {i}u * members);
#end
#for q in 0..QUADS
#for r in 0..4
            let bytes_{i}_{q}_{r} = bytes_{r}(unit_{q}_{i});
#for t in 0..TOKENS
            sum_{q}_{t}[{r}] += sum_{r}(unit_{q}_{i}, rows_{q}, products(bytes_{i}_{q}_{r}, x_{i}_{t}), total(x_{i}_{t}));
#end
#end
#end
#end
        }
        for (; octet < sizes.octets; octet += members) {
#for t in 0..TOKENS
            let x_{t} = digits_at(from_{t} + octet);
#end
#for q in 0..QUADS
            let unit_{q} = fetch(quad_{q}, octet);
#for r in 0..4
            let bytes_{q}_{r} = bytes_{r}(unit_{q});
#for t in 0..TOKENS
            sum_{q}_{t}[{r}] += sum_{r}(unit_{q}, rows_{q}, products(bytes_{q}_{r}, x_{t}), total(x_{t}));
#end
#end
#end
        }
#if SUBGROUPS
#for q in 0..QUADS
#for t in 0..TOKENS
        sum_{q}_{t} = subgroupAdd(sum_{q}_{t});
#end
#end
        if lane == 0u {
#for q in 0..QUADS
#for t in 0..TOKENS
#if SHARED
            sums[subgroup * {SUMS_PER_THREAD}u + {q}u * {TOKENS}u + {t}u] = sum_{q}_{t};
#else
            for (var row = 0u; row < 4u; row++) {
                write(first_quad + {q}u, end_quad, row, first_token + {t}u, sum_{q}_{t}[row]);
            }
#endif
#end
#end
        }
#else
#for q in 0..QUADS
#for t in 0..TOKENS
        sums[thread * {SUMS_PER_THREAD}u + {q}u * {TOKENS}u + {t}u] = sum_{q}_{t};
#end
#end
        for (var half = {THREADS}u / 2u; half > 0u; half /= 2u) {
            workgroupBarrier();
            if thread < half {
#for s in 0..SUMS_PER_THREAD
                sums[thread * {SUMS_PER_THREAD}u + {s}u] += sums[(thread + half) * {SUMS_PER_THREAD}u + {s}u];
#end
            }
        }
#endif
#if SHARED
        workgroupBarrier();
        // A thread for each row and token.
        for (var out = thread; out < teams * 4u * {SUMS_PER_THREAD}u; out += {THREADS}u) {
            let row = out % 4u;
            let place = out / 4u % {SUMS_PER_THREAD}u;
            let number = out / (4u * {SUMS_PER_THREAD}u);
            var sum = 0.0;
            for (var part = 0u; part < split; part++) {
                sum += sums[(number * split + part) * {SUMS_PER_THREAD}u + place][row];
            }
            write(base + number * {QUADS}u + place / {TOKENS}u, end_quad, row, first_token + place % {TOKENS}u, sum);
        }
        workgroupBarrier();
#endif
    }
}

fn write(quad: u32, end_quad: u32, row: u32, token: u32, sum: f32) {
    if quad < end_quad && 4u * quad + row < sizes.slab_rows && token < sizes.tokens {
        let to = token * sizes.rows + sizes.first_row + 4u * quad + row;
        outputs[to] = sum * row_scales(rows_of(quad))[row] * sizes.scale;
    }
}
