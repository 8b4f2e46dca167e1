/* GPTVQ times one vector with tables in registers: AVX-512 VBMI and VNNI.
 *
 * The entries of an int8 codebook are split into `vector_dim` planes of at most 256 bytes, each in
 * 1, 2 or 4 registers. 64 codes, whatever their width, become 64 bytes; one or two byte shuffles
 * look up a plane for all of them; and a dot product of bytes multiplies with the entries of x that
 * belong to the plane. These are integers of 16 (or 24) bits in two (three) bytes, of one scale per
 * segment, that is per 64 codes: rounding them is the only error that single precision does not
 * make as well, at most 2**-16 (2**-24) of the segment's largest entry. */
#ifndef HF_VQ_CPU_GPTVQ_VBMI_H
#define HF_VQ_CPU_GPTVQ_VBMI_H
#include "cpu_gptvq.h"

enum { VBMI_TOKENS = 4 }; /* at once: a vector that is looked up serves all of them */

/* How many tokens of `left` are best computed together: VBMI_TOKENS, the last of which may be zero,
 * or 1. */
static i64 vbmi_at_once(const gptvq_t *w, i64 left, int planes) {
    return left >= VBMI_TOKENS - 1 && planes == 2 && w->vector_dim <= 4 ? VBMI_TOKENS : 1;
}

#ifndef HF_VQ_VBMI
static int vbmi_suits(const gptvq_t *w) {
    (void)w;
    return 0;
}
static int vbmi_linear(const gptvq_t *w, const float *scales, const float *x, float *y, i64 tokens,
                       int planes, i64 threads) {
    (void)w, (void)scales, (void)x, (void)y, (void)tokens, (void)planes, (void)threads;
    return 1;
}
#else

enum { BLOCK = 16 }; /* rows that use a table while it is at hand */

/* At most 64 codes of one stripe, or 32 of two rows. */
typedef struct {
    i64 stripe, byte; /* of the row, where its codes start */
    i64 bytes;        /* of its codes */
    float scale[VBMI_TOKENS]; /* of the entries of x */
    i64 first_block;
    __m512i block; /* per lane: its scale block less first_block, and 16 more in a second row */
} segment_t;

typedef struct {
    const gptvq_t *w;
    const float *scales;
    segment_t *segments;
    int8_t *x;     /* (segments, tokens, vector_dim, planes, 64) */
    int32_t *init; /* (segments, tokens, planes, 16): what takes the bias of 128 off again */
    float *y;      /* (tokens, rows) */
    i64 num_segments, tokens, planes;
    int pair; /* two rows per register */
} vbmi_t;

/* Bytes p, p + d, ... of up to 64 entries of d bytes. */
INLINE __m512i plane(const int8_t *entries, i64 bytes, i64 d, i64 p) {
    uint8_t pick[64];
    for (i64 i = 0; i < 64; i++) pick[i] = (uint8_t)((i * d + p) & 63);
    __m512i picks = _mm512_loadu_si512(pick), out = _mm512_setzero_si512();
    i64 each = 64 / d; /* entries of one load */
    for (i64 j = 0; j < d; j++) {
        __mmask64 place = first_bytes(each) << (j * each);
        __m512i part = _mm512_maskz_loadu_epi8(first_bytes(bytes - 64 * j), entries + 64 * j);
        out = _mm512_mask_permutexvar_epi8(out, place, picks, part);
    }
    return out;
}

INLINE __m512i plane_of(const int8_t *entries, i64 bytes, i64 d, i64 p) {
    switch (d) { /* constants make the loop above a few instructions */
    case 1: return plane(entries, bytes, 1, p);
    case 2: return plane(entries, bytes, 2, p);
    case 4: return plane(entries, bytes, 4, p);
    default: return plane(entries, bytes, 8, p);
    }
}

/* Codes of one row; wide loads that reach into the next cache line would wait for it. */
INLINE __m512i load_codes(const uint8_t *bytes, __mmask64 inside, int narrow) {
    if (!narrow) return _mm512_maskz_loadu_epi8(inside, bytes);
    return _mm512_zextsi256_si512(_mm256_maskz_loadu_epi8((__mmask32)inside, bytes));
}

/* Rows row .. row + n - 1, of one group, for N tokens: T registers per plane, X bytes of x. */
INLINE void row_block(const vbmi_t *task, const __m512i *tables, const float *scales, i64 row, i64 n,
                      i64 group, i64 groups, const i64 D, const i64 T, const i64 X, const i64 N) {
    const gptvq_t *w = task->w;
    int bits = bits_of(w->num_centroids);
    i64 stride = ceil_div(ceil_div(w->columns, w->vector_dim) * bits, 32) * 4;
    __m512i fields, picks;
    {
        uint8_t field[64], pick[64];
        for (int i = 0; i < 64; i++) {
            int half = task->pair && i >= 32, q = (i - 32 * half) / 8, j = i % 8;
            field[i] = (uint8_t)(j * bits);
            pick[i] = (uint8_t)(64 * half + q * bits + (j < bits ? j : 0));
        }
        fields = _mm512_loadu_si512(field);
        picks = _mm512_loadu_si512(pick);
    }
    __m512i mask = _mm512_set1_epi8((char)((1 << bits) - 1));
    __m512 sums[VBMI_TOKENS][BLOCK];
    for (i64 i = 0; i < n; i++)
        for (i64 m = 0; m < N; m++) sums[m][i] = _mm512_setzero_ps();
    i64 step = task->pair ? 2 : 1;
    for (i64 s = 0; s < task->num_segments; s++) {
        const segment_t *segment = task->segments + s;
        const __m512i *stored = tables + segment->stripe * D * T;
        __m512i table[8][4], init[VBMI_TOKENS][3];
        for (i64 p = 0; p < D; p++)
            for (i64 q = 0; q < T; q++) table[p][q] = _mm512_load_si512(stored + p * T + q);
        for (i64 m = 0; m < N; m++)
            for (i64 k = 0; k < X; k++)
                init[m][k] = _mm512_load_si512(task->init + ((s * N + m) * X + k) * 16);
        float book_scale = 1;
        if (w->book_scales) book_scale = w->book_scales[segment->stripe * groups + group];
        const int8_t *x = task->x + s * N * D * X * 64;
        __mmask64 inside = first_bytes(segment->bytes);
        int narrow = segment->bytes <= 32;
        const uint8_t *bytes = (const uint8_t *)w->indices + row * stride + segment->byte;
        for (i64 i = 0; i < n; i += step, bytes += step * stride) {
            __m512i codes = load_codes(bytes, inside, narrow);
            _mm_prefetch((const char *)(bytes + BLOCK * stride), _MM_HINT_T0);
            int both = step == 2 && i + 1 < n;
            if (step == 2) {
                __m512i other = codes;
                if (both) other = load_codes(bytes + stride, inside, 1);
                _mm_prefetch((const char *)(bytes + (BLOCK + 1) * stride), _MM_HINT_T0);
                if (bits == 8)
                    codes = _mm512_inserti64x4(codes, _mm512_castsi512_si256(other), 1);
                else
                    codes = _mm512_permutex2var_epi8(codes, picks, other);
            } else if (bits < 8) {
                codes = _mm512_permutexvar_epi8(picks, codes);
            }
            if (bits < 8)
                codes = _mm512_and_si512(_mm512_multishift_epi64_epi8(fields, codes), mask);
            __mmask64 upper = T == 4 ? _mm512_movepi8_mask(codes) : 0;
            __m512i sum[VBMI_TOKENS][3];
            for (i64 m = 0; m < N; m++)
                for (i64 k = 0; k < X; k++) sum[m][k] = init[m][k];
            for (i64 p = 0; p < D; p++) {
                __m512i value;
                if (T == 1) {
                    value = _mm512_permutexvar_epi8(codes, table[p][0]);
                } else {
                    value = _mm512_permutex2var_epi8(table[p][0], codes, table[p][1]);
                    if (T == 4)
                        value = _mm512_mask_mov_epi8(
                            value, upper,
                            _mm512_permutex2var_epi8(table[p][2], codes, table[p][3]));
                }
                for (i64 m = 0; m < N; m++)
                    for (i64 k = 0; k < X; k++)
                        sum[m][k] = _mm512_dpbusd_epi32(
                            sum[m][k], value, _mm512_load_si512(x + ((m * D + p) * X + k) * 64));
            }
            __m512 factor = _mm512_set1_ps(book_scale);
            if (scales) {
                const float *of_row = scales + i * scale_stride(w) + segment->first_block;
                __m512 first = _mm512_loadu_ps(of_row);
                __m512 second = both ? _mm512_loadu_ps(of_row + scale_stride(w)) : first;
                __m512 by_lane = _mm512_permutex2var_ps(first, segment->block, second);
                factor = _mm512_mul_ps(factor, by_lane);
            }
            for (i64 m = 0; m < N; m++) {
                __m512 total = _mm512_cvtepi32_ps(sum[m][X - 1]);
                for (i64 k = X - 2; k >= 0; k--)
                    total = _mm512_fmadd_ps(total, _mm512_set1_ps(256), _mm512_cvtepi32_ps(sum[m][k]));
                total = _mm512_mul_ps(total, _mm512_set1_ps(segment->scale[m]));
                sums[m][i] = _mm512_fmadd_ps(total, factor, sums[m][i]);
            }
        }
    }
    for (i64 m = 0; m < N; m++)
        for (i64 i = 0; i < n; i += step) {
            float *y = task->y + m * w->rows + row + i;
            y[0] = _mm512_reduce_add_ps(_mm512_maskz_mov_ps(step == 2 ? 0xff : 0xffff, sums[m][i]));
            if (i + 1 < n && step == 2)
                y[1] = _mm512_reduce_add_ps(_mm512_maskz_mov_ps(0xff00, sums[m][i]));
        }
}

#define SHAPE(D, T, X, N)                                                                          \
    static void row_block_##D##_##T##_##X##_##N(const vbmi_t *task, const __m512i *tables,         \
                                                const float *scales, i64 row, i64 n, i64 group,    \
                                                i64 groups) {                                      \
        row_block(task, tables, scales, row, n, group, groups, D, T, X, N);                        \
    }
#define SHAPES(D, X, N) SHAPE(D, 1, X, N) SHAPE(D, 2, X, N) SHAPE(D, 4, X, N)
SHAPES(1, 2, 1) SHAPES(2, 2, 1) SHAPES(4, 2, 1) SHAPES(8, 2, 1)
SHAPES(1, 3, 1) SHAPES(2, 3, 1) SHAPES(4, 3, 1) SHAPES(8, 3, 1)
SHAPES(1, 2, 4) SHAPES(2, 2, 4) SHAPES(4, 2, 4)
typedef void (*row_block_t)(const vbmi_t *, const __m512i *, const float *, i64, i64, i64, i64);
#define NAMES(D, X, N) {row_block_##D##_1_##X##_##N, row_block_##D##_2_##X##_##N, row_block_##D##_4_##X##_##N}
static const row_block_t row_blocks[2][4][3] = {
    {NAMES(1, 2, 1), NAMES(2, 2, 1), NAMES(4, 2, 1), NAMES(8, 2, 1)},
    {NAMES(1, 3, 1), NAMES(2, 3, 1), NAMES(4, 3, 1), NAMES(8, 3, 1)}};
static const row_block_t row_blocks_4[3][3] = {NAMES(1, 2, 4), NAMES(2, 2, 4), NAMES(4, 2, 4)};

static int vbmi_rows_of_thread(const void *context, i64 thread, i64 threads) {
    const vbmi_t *task = context;
    const gptvq_t *w = task->w;
    i64 d = w->vector_dim, k = w->num_centroids, T = k <= 64 ? 1 : k <= 128 ? 2 : 4;
    i64 groups = ceil_div(w->rows, w->group_rows), stripes = ceil_div(w->columns, w->group_columns);
    __m512i *tables = allocate(stripes * d * T * 64);
    float *scales = allocate(BLOCK * scale_stride(w) * 4);
    int failed = !tables || !scales;
    row_block_t compute = task->tokens == 1 ? row_blocks[task->planes - 2][bits_of(d)][T / 2]
                                            : row_blocks_4[bits_of(d)][T / 2];
    const __m512i bias = _mm512_set1_epi8((char)128);
    i64 low = w->rows * thread / threads, high = w->rows * (thread + 1) / threads, made = -1;
    for (i64 row = low; row < high && !failed;) {
        i64 group = row / w->group_rows;
        i64 n = smaller(smaller(BLOCK, high - row), (group + 1) * w->group_rows - row);
        if (group != made) {
            for (i64 s = 0; s < stripes; s++)
                for (i64 q = 0; q < T; q++) {
                    i64 skip = 64 * q * d, bytes = k * d - skip;
                    const int8_t *entries = w->books8 + (s * groups + group) * k * d + skip;
                    for (i64 p = 0; p < d; p++) {
                        __m512i at = bytes > 0 ? plane_of(entries, bytes, d, p) : bias;
                        tables[(s * d + p) * T + q] = _mm512_xor_si512(at, bias);
                    }
                }
            made = group;
        }
        for (i64 i = 0; i < n && w->scale_block; i++)
            expand_scales(w, task->scales, row + i, 0, ceil_div(w->columns, w->scale_block),
                          scales + i * scale_stride(w));
        compute(task, tables, w->scale_block ? scales : NULL, row, n, group, groups);
        row += n;
    }
    free(tables);
    free(scales);
    return failed;
}

/* The columns of segment s of token m, rounded: its bytes of x, their sums and their scale. */
static void round_x(vbmi_t *task, const float *x, i64 s, i64 m, i64 first, i64 codes) {
    const gptvq_t *w = task->w;
    i64 d = w->vector_dim, n = smaller(codes * d, w->columns - first), planes = task->planes;
    float largest = 0;
    int8_t bytes[3][512];
    int finite = 1;
    x += first;
    for (i64 j = 0; j < n; j++) {
        largest = fmaxf(largest, fabsf(x[j]));
        finite &= x[j] - x[j] == 0;
    }
    float most = planes == 2 ? 32639.f : 8355000.f; /* 127 or less in every byte, after rounding */
    float unit = finite && largest > most * 1e-38f ? most / largest : 0;
    /* too small for a unit: nothing beside any weight */
    task->segments[s].scale[m] = finite ? (unit > 0 ? largest / most : 0) : NAN;
    for (i64 j = 0; j < n; j++) {
        int32_t value = unit > 0 ? (int32_t)rintf(x[j] * unit) : 0;
        for (i64 k = 0; k < 3; k++) {
            bytes[k][j] = (int8_t)(value & 255);
            value = (value - bytes[k][j]) >> 8;
        }
    }
    const __m512i bias = _mm512_set1_epi8((char)128);
    for (i64 k = 0; k < planes; k++) {
        __m512i sum = _mm512_setzero_si512();
        for (i64 p = 0; p < d; p++) {
            __m512i part = plane_of(bytes[k], n, d, p);
            if (task->pair) part = _mm512_inserti64x4(part, _mm512_castsi512_si256(part), 1);
            i64 at = ((s * task->tokens + m) * d + p) * planes + k;
            _mm512_store_si512(task->x + at * 64, part);
            sum = _mm512_dpbusd_epi32(sum, bias, part);
        }
        sum = _mm512_sub_epi32(_mm512_setzero_si512(), sum);
        _mm512_store_si512(task->init + ((s * task->tokens + m) * planes + k) * 16, sum);
    }
}

/* Whether codebooks and shapes fit what is here. */
static int vbmi_suits(const gptvq_t *w) {
    i64 d = w->vector_dim, bits = bits_of(w->num_centroids), B = w->scale_block;
    i64 stripes = ceil_div(w->columns, w->group_columns), vectors = ceil_div(w->columns, d);
    i64 per_stripe = stripes == 1 ? vectors : w->group_columns / d;
    if (!w->books8 || bits > 8 || bits < 1 || (stripes > 1 && per_stripe * bits % 8)) return 0;
    if (!B) return 1;
    /* a lane of sums, four codes, is in one block, and those of a register in 16 at most */
    return B % (4 * d) == 0 && (stripes == 1 || per_stripe % 4 == 0) && 64 * d / B <= 14;
}

/* y (tokens, rows) = x (tokens, columns) @ W.T, if vbmi_suits(w), for as many tokens as vbmi_at_once
 * says. Returns 0, or 1 without memory. */
static int vbmi_linear(const gptvq_t *w, const float *scales, const float *x, float *y, i64 tokens,
                       int planes, i64 threads) {
    i64 d = w->vector_dim, bits = bits_of(w->num_centroids), B = w->scale_block;
    i64 stripes = ceil_div(w->columns, w->group_columns), vectors = ceil_div(w->columns, d);
    i64 per_stripe = stripes == 1 ? vectors : w->group_columns / d;
    vbmi_t task = {w, scales, NULL, NULL, NULL, y, 0, tokens, planes, per_stripe <= 32};
    i64 each = task.pair ? 32 : 64;
    i64 most = stripes * ceil_div(per_stripe, each);
    task.segments = allocate(most * (i64)sizeof(segment_t));
    task.x = allocate(most * tokens * d * planes * 64);
    task.init = allocate(most * tokens * planes * 64);
    int failed = !task.segments || !task.x || !task.init;
    i64 s = 0;
    for (i64 stripe = 0; stripe < stripes && !failed; stripe++) {
        i64 start = stripe * per_stripe, end = smaller(start + per_stripe, vectors);
        for (i64 v = start; v < end; v += each, s++) {
            segment_t *segment = task.segments + s;
            i64 codes = smaller(each, end - v), column = v * d;
            segment->stripe = stripe;
            segment->byte = v * bits / 8;
            segment->bytes = ceil_div(codes * bits, 8);
            for (i64 m = 0; m < tokens; m++)
                round_x(&task, x + m * w->columns, s, m, column, codes);
            segment->first_block = B ? column / B : 0;
            int32_t block[16] = {0};
            for (int lane = 0; lane < 16 && B; lane++) {
                i64 last = smaller(column + (task.pair ? lane & 7 : lane) * 4 * d, w->columns - 1);
                block[lane] = (int32_t)(last / B - segment->first_block) + (task.pair ? lane & 8 : 0) * 2;
            }
            segment->block = _mm512_loadu_si512(block);
        }
    }
    task.num_segments = s;
    if (!failed) failed = parallel(vbmi_rows_of_thread, &task, threads);
    free(task.segments);
    free(task.x);
    free(task.init);
    return failed;
}
#endif
#endif
