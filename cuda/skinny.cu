// y = x Wᵀ for few tokens: the weights stream from memory once, and tensor cores do the sums.
//
// Weights are the 16-row operand of mma.m16n8k16 and tokens its 8 columns, so eight tokens cost what one does. A block
// stages its slice of x in shared memory once and walks over strips of 16 rows; its warps share the columns of a
// strip, pairs of tiles in turn. Each warp copies its own tiles, DEPTH pairs in flight, also across the end of a strip, so
// that memory never waits for sums and warps wait for each other only at the end of a strip. The warps' sums meet in shared memory; where K is cut into slices over blocks, the
// last block to arrive at a strip adds the slices in order (always the same order, so results repeat) and leaves the
// counter at zero for the next launch.
//
// Grid: x strips (persistent), y slices of K, z matrices of a batch. -DWARPS, -DDEPTH, -DCOLUMNS (tiles of 8 tokens),
// -DBLOCKS (a multiprocessor's blocks, for the register budget).
#include "layouts.cuh"

namespace tenpak {

constexpr int THREADS = WARPS * LANES;
constexpr int TOKENS = 8 * COLUMNS;
// Independent sums for the two halves of a tile: a chain of dependent products would be all latency.
constexpr int CHAINS = COLUMNS <= 2 ? 2 : 1;
// Two reduction buffers save a barrier for each strip.
constexpr int BUFFERS = COLUMNS <= 2 ? 2 : 1;
// A row of x in shared memory is longer by 64 bytes: eight lanes that read two rows then meet all 32 banks.
constexpr int ROW_PAD = 64;

__device__ __forceinline__ void multiply(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if BF16
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#endif
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// x[first .. first+count, columns of the slice] to shared memory, zeros beyond K.
__device__ __forceinline__ void stage(u8* to, const u16* x, int row_bytes, int count, int k, int first_column, int columns,
                                      long long stride) {
    const bool vectors = k % 8 == 0 && stride % 8 == 0 && (u64)x % 16 == 0;
    for (int row = 0; row < count; ++row) {
        const u16* from = x + row * stride + first_column;
        u8* line = to + row * row_bytes;
        if (vectors) {
            for (int c = threadIdx.x * 8; c < columns; c += THREADS * 8) {
                const int bytes = first_column + c < k ? 16 : 0;
                asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                             :: "r"(shared_address(line + 2 * c)), "l"(bytes ? from + c : x), "r"(bytes) : "memory");
            }
        } else {
            for (int c = threadIdx.x; c < columns; c += THREADS)
                reinterpret_cast<u16*>(line)[c] = first_column + c < k ? from[c] : (u16)0;
        }
    }
}

// Half a tile times its columns of x, for all tokens.
template <int HALF>
__device__ __forceinline__ void half_tile(const Layout::Tile& tile, const Layout::Rows& rows, const u8* const (&x)[COLUMNS],
                                          int offset, float (&sums)[CHAINS][COLUMNS][4]) {
    u32 a[2][4];
    fragments<HALF>(tile, rows, a);
#pragma unroll
    for (int column = 0; column < COLUMNS; ++column) {
        const uint4 b = *reinterpret_cast<const uint4*>(x[column] + offset + 64 * HALF);
        multiply(sums[HALF % CHAINS][column], a[0], b.x, b.y);
        multiply(sums[HALF % CHAINS][column], a[1], b.z, b.w);
    }
}

__device__ __forceinline__ void multiply_tile(const Layout::Tile& tile, const Layout::Rows& rows, const u8* const (&x)[COLUMNS],
                                              int offset, float (&sums)[CHAINS][COLUMNS][4]) {
    half_tile<0>(tile, rows, x, offset, sums);
    half_tile<1>(tile, rows, x, offset, sums);
}

struct Output {
    u16* y;
    const u16* bias;
    int n;
    float scale;

    // One lane's four sums: rows g and g + 8 of the strip, tokens 2t and 2t + 1.
    __device__ __forceinline__ void store(const float4& sum, int strip, int token, int tokens, float low, float high, int lane) const {
        const int row = strip * TILE_ROWS + lane / 4;
        token += lane % 4 * 2;
        const float v[4] = {sum.x * low, sum.y * low, sum.z * high, sum.w * high};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int r = row + i / 2 * 8, m = token + i % 2;
            if (r < n && m < tokens) y[(size_t)m * n + r] = narrow(v[i] * scale + (bias ? widen(bias[r]) : 0.0f));
        }
    }
};

__device__ __forceinline__ void add(float4& a, const float4& b) {
    a.x += b.x;
    a.y += b.y;
    a.z += b.z;
    a.w += b.w;
}

}  // namespace tenpak

// x [batch, m, k] with rows of x_stride elements, or, with offsets [batch + 1], all experts' tokens one after another,
// sorted by expert. y alike with rows of n. bias [batch, n] or null. slice: tiles of K for each block; partial
// [slots, slices, strips, COLUMNS, lanes] float4 and arrived [slots, strips, COLUMNS] serve slices > 1.
extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS)
skinny(const unsigned char* codes, const unsigned char* params, const unsigned char* row_params, const unsigned short* x,
       unsigned short* y, const unsigned short* bias, const int* offsets, float4* partial, unsigned int* arrived,
       long long codes_step, long long params_step, long long row_params_step, long long x_stride, int m, int n, int k,
       int tiles, int supers, int slice, float scale) {
    using namespace tenpak;
    extern __shared__ uint4 dynamic[];
    const int warp = __shfl_sync(~0u, threadIdx.x / LANES, 0), lane = threadIdx.x % LANES, g = lane / 4, t = lane % 4;
    const int matrix = blockIdx.z, slices = gridDim.y;
    const int strips = (n + TILE_ROWS - 1) / TILE_ROWS;
    const int first_tile = blockIdx.y * slice, count = min(slice, tiles - first_tile);
    // Steps of a warp, each two tiles, filled up to whole turns of the ring.
    const int steps = ((count + 2 * WARPS - 1) / (2 * WARPS) + DEPTH - 1) / DEPTH * DEPTH;
    const Weight weight{codes + matrix * codes_step, params + matrix * params_step, row_params + matrix * row_params_step,
                        tiles, supers};
    const long long begin = offsets ? offsets[matrix] : (long long)matrix * m;
    const int total = offsets ? offsets[matrix + 1] - (int)begin : m;
    if (total <= 0) return;

    const int row_bytes = count * TILE_COLS * 2 + ROW_PAD;
    float4* sums_of_warps = reinterpret_cast<float4*>(dynamic);
    u8* stages = reinterpret_cast<u8*>(sums_of_warps + BUFFERS * WARPS * COLUMNS * LANES);
    u8* staged_x = stages + WARPS * DEPTH * STAGE_BYTES;
    const u32 my_stages = shared_address(stages) + warp * (DEPTH * STAGE_BYTES);

#ifdef LUT16_TABLES
    Lut16::prepare(threadIdx.x);
#endif

    for (int chunk = 0; chunk * TOKENS < total; ++chunk) {
        const int token = chunk * TOKENS, tokens = min(TOKENS, total - token);
        const Output out{y + (begin + token) * n, bias ? bias + (size_t)matrix * n : nullptr, n, scale};
        const size_t slot = begin / TOKENS + matrix + chunk;

        if (chunk) __syncthreads();
        stage(staged_x, x + (begin + token) * x_stride, row_bytes, tokens, k, first_tile * TILE_COLS, count * TILE_COLS, x_stride);
        commit_copies();
#pragma unroll
        for (int i = 0; i < DEPTH; ++i) {
            const int tile = 2 * (i * WARPS + warp);
            if (tile < count)
                copy_stage(weight, blockIdx.x, first_tile + tile, min(2, count - tile), my_stages + i * STAGE_BYTES, lane);
            commit_copies();
        }
        Layout::Rows rows = Layout::rows(weight, blockIdx.x, lane);
        wait_for_copies<DEPTH>();
        __syncthreads();

        const u8* my_x[COLUMNS];
#pragma unroll
        for (int column = 0; column < COLUMNS; ++column)
            my_x[column] = staged_x + min(column * 8 + g, tokens - 1) * row_bytes + t * 16;

        int turn = 0;
        for (int strip = blockIdx.x; strip < strips; strip += gridDim.x, ++turn) {
            const int after = strip + gridDim.x;
            const Layout::Rows rows_after = Layout::rows(weight, after < strips ? after : strip, lane);
            float sums[CHAINS][COLUMNS][4] = {};
            for (int base = 0; base < steps; base += DEPTH) {
                const bool last = base + DEPTH >= steps;
                const int strip_ahead = last ? after : strip, base_ahead = last ? 0 : base + DEPTH;
                const int count_ahead = strip_ahead < strips ? count : 0;
#pragma unroll
                for (int i = 0; i < DEPTH; ++i) {
                    const int tile = 2 * ((base + i) * WARPS + warp), ahead = 2 * ((base_ahead + i) * WARPS + warp);
                    wait_for_copies<DEPTH - 1>();
                    __syncwarp();
                    const u8* my_stage = stages + (warp * DEPTH + i) * STAGE_BYTES;
                    const Layout::Tile first = read_stage<0>(my_stage, lane), second = read_stage<1>(my_stage, lane);
                    __syncwarp();
                    if (ahead < count_ahead)
                        copy_stage(weight, strip_ahead, first_tile + ahead, min(2, count_ahead - ahead),
                                   my_stages + i * STAGE_BYTES, lane);
                    commit_copies();
                    if (tile < count) multiply_tile(first, rows, my_x, tile * (TILE_COLS * 2), sums);
                    if (tile + 1 < count) multiply_tile(second, rows, my_x, (tile + 1) * (TILE_COLS * 2), sums);
                }
            }

            // The warps' sums.
            float4* buffer = sums_of_warps + (turn % BUFFERS) * WARPS * COLUMNS * LANES;
            if (BUFFERS == 1 && turn) __syncthreads();
#pragma unroll
            for (int column = 0; column < COLUMNS; ++column) {
                float4 sum = make_float4(sums[0][column][0], sums[0][column][1], sums[0][column][2], sums[0][column][3]);
                if (CHAINS == 2)
                    add(sum, make_float4(sums[CHAINS - 1][column][0], sums[CHAINS - 1][column][1], sums[CHAINS - 1][column][2],
                                         sums[CHAINS - 1][column][3]));
                buffer[(warp * COLUMNS + column) * LANES + lane] = sum;
            }
            __syncthreads();
            for (int column = (warp + turn) % WARPS; column < COLUMNS; column += WARPS) {
                if (column * 8 >= tokens) break;
                float4 sum = buffer[column * LANES + lane];
#pragma unroll
                for (int other = 1; other < WARPS; ++other) add(sum, buffer[(other * COLUMNS + column) * LANES + lane]);
                bool mine = true;
                if (slices > 1) {
                    const size_t place = ((slot * slices) * strips + strip) * COLUMNS + column;
                    const size_t step = (size_t)strips * COLUMNS;
                    __stcg(partial + (place + blockIdx.y * step) * LANES + lane, sum);
                    __threadfence();
                    __syncwarp();
                    unsigned int* counter = arrived + (slot * strips + strip) * COLUMNS + column;
                    u32 before = 0;
                    if (lane == 0) before = atomicAdd(counter, 1);
                    mine = __shfl_sync(~0u, before, 0) + 1 == (u32)slices;
                    if (mine) {
                        __threadfence();
                        sum = __ldcg(partial + place * LANES + lane);
                        for (int other = 1; other < slices; ++other) add(sum, __ldcg(partial + (place + other * step) * LANES + lane));
                        if (lane == 0) *counter = 0;
                    }
                }
                if (mine) out.store(sum, strip, column * 8, tokens, Layout::row_scale(rows, false), Layout::row_scale(rows, true), lane);
            }
            rows = rows_after;
        }
    }
}
