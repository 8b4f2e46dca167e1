/* GPTVQ times one vector with tables in registers of AVX2: codes of 4 or 6 bits, vectors of up to 4.
 *
 * The entries of an int8 codebook are split into `vector_dim` planes of 16 or 64 bytes, biased to
 * 0 .. 255. 32 codes become 32 bytes; byte shuffles look up a plane for all of them; and products of
 * bytes, summed by fours, multiply with the entries of x that belong to the plane. These are integers
 * of 14 (or 21) bits in two (three) digits of base 128, -64 .. 63, so that two products fit 16 bits;
 * they have one scale per segment, that is per 32 codes. Rounding them is the only error that single
 * precision does not make as well, at most 2**-14 (2**-21) of the segment's largest entry. */
#ifndef HF_VQ_CPU_GPTVQ_AVX2_H
#define HF_VQ_CPU_GPTVQ_AVX2_H
#include "cpu_gptvq.h"

#if !defined(__AVX2__) || !defined(__FMA__)
static int avx2_suits(const gptvq_t *w) {
    (void)w;
    return 0;
}
static int avx2_linear(const gptvq_t *w, const float *scales, const float *x, float *y, int planes,
                       i64 threads) {
    (void)w, (void)scales, (void)x, (void)y, (void)planes, (void)threads;
    return 1;
}
#else
#include <immintrin.h>

enum { SHUFFLED = 32, SHUFFLED_ROWS = 16 }; /* codes of a segment, rows that use a table at hand */

typedef struct {
    i64 stripe, byte, bytes; /* of the row: where its codes start, and how many bytes they are */
    float scale;             /* of the entries of x */
    i64 first_block;
    __m256i block; /* per lane: its scale block less first_block */
} shuffled_t;

typedef struct {
    const gptvq_t *w;
    const float *scales;
    shuffled_t *segments;
    int8_t *x;     /* (segments, vector_dim, planes, 32) */
    int32_t *init; /* (segments, 2, 8): what takes the bias of 128 off again */
    float *y;
    i64 num_segments, planes;
} avx2_t;

static int avx2_suits(const gptvq_t *w) {
    i64 d = w->vector_dim, bits = bits_of(w->num_centroids), stripes = ceil_div(w->columns, w->group_columns);
    if (!w->books8 || (bits != 4 && bits != 6) || d > 4) return 0;
    if (stripes > 1 && w->group_columns / d * bits % 8) return 0;
    /* a lane of sums is 8 codes of 4 bits or 4 of 6, from the start of its stripe on */
    i64 lane = (bits == 4 ? 8 : 4) * d;
    return !w->scale_block || (w->scale_block % lane == 0 && (stripes == 1 || w->group_columns % lane == 0));
}

/* Codes as bytes: of 4 bits the even ones first, of 6 in their order. */
INLINE __m256i shuffled_codes(const uint8_t *from, i64 bytes, const int bits) {
    uint8_t padded[32] = {0};
    if (bytes < SHUFFLED * bits / 8) {
        memcpy(padded, from, (size_t)bytes);
        from = padded;
    }
    __m128i first = _mm_loadu_si128((const void *)from);
    if (bits == 4) {
        __m256i both = _mm256_broadcastsi128_si256(first);
        const __m256i down = _mm256_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4);
        return _mm256_and_si256(_mm256_srlv_epi32(both, down), _mm256_set1_epi8(15));
    }
    /* 4 codes are 3 bytes: bytes 0 and 1 hold the first two, 1 and 2 the others */
    const __m256i pick = _mm256_setr_epi8(0, 1, 1, 2, 3, 4, 4, 5, 6, 7, 7, 8, 9, 10, 10, 11, 4, 5, 5, 6,
                                          7, 8, 8, 9, 10, 11, 11, 12, 13, 14, 14, 15);
    __m256i both = _mm256_inserti128_si256(_mm256_castsi128_si256(first),
                                           _mm_loadu_si128((const void *)(from + 8)), 1);
    both = _mm256_shuffle_epi8(both, pick);
    __m256i even = _mm256_blend_epi16(both, _mm256_srli_epi16(both, 4), 0xaa);
    __m256i odd = _mm256_blend_epi16(_mm256_slli_epi16(both, 2), _mm256_srli_epi16(both, 2), 0xaa);
    return _mm256_or_si256(_mm256_and_si256(even, _mm256_set1_epi16(0x3f)),
                           _mm256_and_si256(odd, _mm256_set1_epi16(0x3f00)));
}

INLINE void shuffled_rows(const avx2_t *task, const __m256i *tables, const float *scales, i64 row, i64 n,
                          i64 group, const i64 D, const int bits, const i64 X) {
    const gptvq_t *w = task->w;
    const i64 T = bits == 4 ? 1 : 4;
    i64 stride = ceil_div(ceil_div(w->columns, D) * bits, 32) * 4;
    i64 groups = ceil_div(w->rows, w->group_rows);
    const __m256i ones = _mm256_set1_epi16(1), base = _mm256_set1_epi16(128);
    __m256 sums[SHUFFLED_ROWS];
    for (i64 i = 0; i < n; i++) sums[i] = _mm256_setzero_ps();
    for (i64 s = 0; s < task->num_segments; s++) {
        const shuffled_t *segment = task->segments + s;
        const __m256i *stored = tables + segment->stripe * D * T;
        __m256i table[4][4];
        for (i64 p = 0; p < D; p++)
            for (i64 t = 0; t < T; t++) table[p][t] = stored[p * T + t];
        const __m256i *x = (const __m256i *)(task->x + s * D * X * 32);
        const __m256i *init = (const __m256i *)(task->init + s * 16);
        float scale = segment->scale;
        if (w->book_scales) scale *= w->book_scales[segment->stripe * groups + group];
        const uint8_t *bytes = (const uint8_t *)w->indices + row * stride + segment->byte;
        for (i64 i = 0; i < n; i++, bytes += stride) {
            __m256i codes = shuffled_codes(bytes, segment->bytes, bits);
            _mm_prefetch((const char *)(bytes + SHUFFLED_ROWS * stride), _MM_HINT_T0);
            __m256i low = init[0], high = init[1];
            for (i64 p = 0; p < D; p++) {
                __m256i value = _mm256_shuffle_epi8(table[p][0], codes);
                if (T == 4) { /* bits 4 and 5 choose, once they are the highest of a byte */
                    __m256i by_4 = _mm256_slli_epi16(codes, 3), by_5 = _mm256_slli_epi16(codes, 2);
                    __m256i upper = _mm256_shuffle_epi8(table[p][2], codes);
                    value = _mm256_blendv_epi8(value, _mm256_shuffle_epi8(table[p][1], codes), by_4);
                    upper = _mm256_blendv_epi8(upper, _mm256_shuffle_epi8(table[p][3], codes), by_4);
                    value = _mm256_blendv_epi8(value, upper, by_5);
                }
                __m256i part = _mm256_madd_epi16(_mm256_maddubs_epi16(value, x[p * X]), ones);
                low = _mm256_add_epi32(low, part);
                part = _mm256_madd_epi16(_mm256_maddubs_epi16(value, x[p * X + 1]), base);
                low = _mm256_add_epi32(low, part);
                if (X == 2) continue;
                part = _mm256_madd_epi16(_mm256_maddubs_epi16(value, x[p * X + 2]), ones);
                high = _mm256_add_epi32(high, part);
            }
            __m256 total = _mm256_cvtepi32_ps(low), factor = _mm256_set1_ps(scale);
            if (X == 3) total = _mm256_fmadd_ps(_mm256_cvtepi32_ps(high), _mm256_set1_ps(16384), total);
            if (scales) {
                const float *of_row = scales + i * scale_stride(w) + segment->first_block;
                __m256 by_lane = _mm256_permutevar8x32_ps(_mm256_loadu_ps(of_row), segment->block);
                factor = _mm256_mul_ps(factor, by_lane);
            }
            sums[i] = _mm256_fmadd_ps(total, factor, sums[i]);
        }
    }
    for (i64 i = 0; i < n; i++) {
        __m128 half = _mm_add_ps(_mm256_castps256_ps128(sums[i]), _mm256_extractf128_ps(sums[i], 1));
        half = _mm_add_ps(half, _mm_movehl_ps(half, half));
        task->y[row + i] = half[0] + half[1];
    }
}

typedef void (*shuffled_rows_t)(const avx2_t *, const __m256i *, const float *, i64, i64, i64);
#define SHUFFLED_SHAPE(D, BITS, X)                                                                 \
    static void shuffled_##D##_##BITS##_##X(const avx2_t *task, const __m256i *tables,             \
                                            const float *scales, i64 row, i64 n, i64 group) {      \
        shuffled_rows(task, tables, scales, row, n, group, D, BITS, X);                            \
    }
#define SHUFFLED_SHAPES(D)                                                                         \
    SHUFFLED_SHAPE(D, 4, 2) SHUFFLED_SHAPE(D, 4, 3) SHUFFLED_SHAPE(D, 6, 2) SHUFFLED_SHAPE(D, 6, 3)
SHUFFLED_SHAPES(1) SHUFFLED_SHAPES(2) SHUFFLED_SHAPES(4)
#define SHUFFLED_NAMES(D)                                                                          \
    {{shuffled_##D##_4_2, shuffled_##D##_4_3}, {shuffled_##D##_6_2, shuffled_##D##_6_3}}
static const shuffled_rows_t shuffled_shapes[3][2][2] = {SHUFFLED_NAMES(1), SHUFFLED_NAMES(2),
                                                         SHUFFLED_NAMES(4)};

static int avx2_rows_of_thread(const void *context, i64 thread, i64 threads) {
    const avx2_t *task = context;
    const gptvq_t *w = task->w;
    i64 d = w->vector_dim, k = w->num_centroids, T = k <= 16 ? 1 : 4, made = -1;
    i64 groups = ceil_div(w->rows, w->group_rows), stripes = ceil_div(w->columns, w->group_columns);
    i64 size = stripes * d * T * 32;
    uint8_t *tables = allocate(size);
    float *scales = allocate(SHUFFLED_ROWS * scale_stride(w) * 4);
    int failed = !tables || !scales;
    if (!failed) memset(tables, 128, (size_t)size);
    shuffled_rows_t compute = shuffled_shapes[bits_of(d)][T / 4][task->planes - 2];
    i64 low = w->rows * thread / threads, high = w->rows * (thread + 1) / threads;
    for (i64 row = low, n; row < high && !failed; row += n) {
        i64 group = row / w->group_rows;
        n = smaller(smaller(SHUFFLED_ROWS, high - row), (group + 1) * w->group_rows - row);
        for (i64 s = 0; s < stripes && group != made; s++) {
            const int8_t *entries = w->books8 + (s * groups + group) * k * d;
            for (i64 c = 0; c < k; c++)
                for (i64 p = 0; p < d; p++) {
                    uint8_t *at = tables + ((s * d + p) * T + c / 16) * 32 + c % 16;
                    at[0] = at[16] = (uint8_t)(entries[c * d + p] + 128);
                }
        }
        made = group;
        for (i64 i = 0; i < n && w->scale_block; i++)
            expand_scales(w, task->scales, row + i, 0, ceil_div(w->columns, w->scale_block),
                          scales + i * scale_stride(w));
        compute(task, (const __m256i *)tables, w->scale_block ? scales : NULL, row, n, group);
    }
    free(tables);
    free(scales);
    return failed;
}

/* Segment s: `codes` codes of x from column `first` on, rounded. */
static void digits_of_x(avx2_t *task, const float *x, i64 s, i64 first, i64 codes, int bits) {
    const gptvq_t *w = task->w;
    i64 d = w->vector_dim, n = smaller(codes * d, w->columns - first), X = task->planes;
    int8_t *to = task->x + s * d * X * 32;
    int32_t *init = task->init + s * 16;
    float largest = 0;
    int finite = 1;
    for (i64 j = 0; j < n; j++) {
        largest = fmaxf(largest, fabsf(x[first + j]));
        finite &= x[first + j] - x[first + j] == 0;
    }
    float most = X == 2 ? 8127 : 1040319; /* 63 in every digit */
    float unit = finite && largest > most * 1e-38f ? most / largest : 0;
    task->segments[s].scale = finite ? (unit > 0 ? largest / most : 0) : NAN;
    memset(to, 0, (size_t)(d * X * 32));
    memset(init, 0, 64);
    for (i64 j = 0; j < n; j++) {
        i64 code = j / d, place = bits == 6 ? code : code / 2 + code % 2 * 16;
        int32_t value = unit > 0 ? (int32_t)rintf(x[first + j] * unit) : 0;
        for (i64 k = 0, weight = 1; k < X; k++, weight = weight == 1 ? 128 : 1) {
            int32_t digit = ((value + 64) & 127) - 64;
            value = (value - digit) >> 7;
            to[(j % d * X + k) * 32 + place] = (int8_t)digit;
            init[k / 2 * 8 + place / 4] -= (int32_t)(128 * weight * digit);
        }
    }
}

/* y = W x for one vector, if avx2_suits(w). Returns 0, or 1 without memory. */
static int avx2_linear(const gptvq_t *w, const float *scales, const float *x, float *y, int planes,
                       i64 threads) {
    i64 d = w->vector_dim, vectors = ceil_div(w->columns, d), B = w->scale_block;
    int bits = bits_of(w->num_centroids);
    i64 stripes = ceil_div(w->columns, w->group_columns);
    i64 per_stripe = stripes == 1 ? vectors : w->group_columns / d;
    i64 most = stripes * ceil_div(per_stripe, SHUFFLED), s = 0;
    avx2_t task = {w, scales, NULL, NULL, NULL, y, 0, planes};
    task.segments = allocate(most * (i64)sizeof(shuffled_t));
    task.x = allocate(most * d * planes * 32);
    task.init = allocate(most * 64);
    int failed = !task.segments || !task.x || !task.init;
    for (i64 stripe = 0; stripe < stripes && !failed; stripe++) {
        i64 end = smaller((stripe + 1) * per_stripe, vectors);
        for (i64 v = stripe * per_stripe; v < end; v += SHUFFLED, s++) {
            shuffled_t *segment = task.segments + s;
            i64 codes = smaller(SHUFFLED, end - v);
            int32_t block[8] = {0};
            segment->stripe = stripe;
            segment->byte = v * bits / 8;
            segment->bytes = ceil_div(codes * bits, 8);
            segment->first_block = B ? v * d / B : 0;
            for (int lane = 0; lane < 8 && B; lane++) {
                i64 code = v + (bits == 4 ? lane % 4 * 8 : lane * 4);
                block[lane] = (int32_t)(smaller(code * d, w->columns - 1) / B - segment->first_block);
            }
            segment->block = _mm256_loadu_si256((const void *)block);
            digits_of_x(&task, x, s, v * d, codes, bits);
        }
    }
    task.num_segments = s;
    if (!failed) failed = parallel(avx2_rows_of_thread, &task, threads);
    free(task.segments);
    free(task.x);
    free(task.init);
    return failed;
}
#endif
#endif
