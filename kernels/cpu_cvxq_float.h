/* Sums of CVXQ levels in float32: with AVX2 the levels of a depth, times scale and x, are one or two
 * registers, in which the codes of 8 rows are looked up at once. */
#ifndef HF_VQ_CPU_CVXQ_FLOAT_H
#define HF_VQ_CPU_CVXQ_FLOAT_H
#include "cpu_cvxq.h"

#ifdef HF_VQ_AVX2

typedef struct { /* how 8 codes of a depth become levels */
    __m256 low, high; /* the levels, of up to 4 bits: entries repeat, so that no code needs a mask */
    __m256i right, left, pick, mask;
} lookup_t;

INLINE lookup_t lookup(const float *levels, const int B) {
    lookup_t how;
    float table[8];
    for (int i = 0; i < 8; i++) table[i] = levels[i & ((1 << B) - 1)];
    how.low = how.high = _mm256_loadu_ps(table);
    if (B == 4) how.high = _mm256_loadu_ps(levels + 8);
    __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    how.right = how.pick = _mm256_mullo_epi32(lane, _mm256_set1_epi32(B));
    how.left = _mm256_sub_epi32(_mm256_set1_epi32(28), how.right); /* bit 3 to the sign */
    how.mask = _mm256_set1_epi32((1 << B) - 1);
    if (B > 4) { /* code i starts in byte i * B / 8 */
        how.pick = _mm256_srli_epi32(how.right, 3);
        how.pick = _mm256_mullo_epi32(how.pick, _mm256_set1_epi32(0x01010101));
        how.pick = _mm256_add_epi8(how.pick, _mm256_set1_epi32(0x03020100));
        how.right = _mm256_and_si256(how.right, _mm256_set1_epi32(7));
    }
    return how;
}

/* The levels of the 8 codes from `at` on, of which 4 bytes are read, of more than 4 bits 16. Up to 4
 * bits levels are those of `low` and `high`, else those of the table. */
INLINE __m256 eight_levels(const lookup_t *how, const float *levels, __m256 low, __m256 high,
                           const uint8_t *at, const int B) {
    if (B > 4) {
        __m256i codes = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)at));
        codes = _mm256_srlv_epi32(_mm256_shuffle_epi8(codes, how->pick), how->right);
        return _mm256_i32gather_ps(levels, _mm256_and_si256(codes, how->mask), 4);
    }
    int32_t word;
    memcpy(&word, at, 4);
    __m256i codes = _mm256_set1_epi32(word), code = _mm256_srlv_epi32(codes, how->right);
    if (B < 3) return _mm256_permutevar_ps(low, code);
    __m256 level = _mm256_permutevar8x32_ps(low, code);
    if (B == 3) return level;
    return _mm256_blendv_ps(level, _mm256_permutevar8x32_ps(high, code),
                            _mm256_castsi256_ps(_mm256_sllv_epi32(codes, how->left)));
}

/* sums[k] += factor * level of rows row + 8 k .. row + 8 k + 7, for the groups of depth B. */
INLINE void add_groups(const cluster_t *c, const float *factors, i64 row, __m256 *sums, const int B,
                       const int K) {
    const float *levels = c->w->levels + (1 << B), *factor = factors + c->at[B];
    const uint32_t *start = c->start + c->at[B];
    const uint8_t *end = (const uint8_t *)(c->words + c->left);
    const lookup_t how = lookup(levels, B);
    i64 n = c->count[B], skip = row * B / 8, reach = (K - 1) * B + (B <= 4 ? 4 : 16);
    __m256 a[8];
#pragma GCC unroll 8
    for (int k = 0; k < K; k++) a[k] = sums[k];
    for (i64 i = 0; i < n; i++) {
        const uint8_t *at = (const uint8_t *)(c->words + start[i]) + skip;
        uint8_t copy[80];
        if (at + reach > end) { /* the last group of all */
            memset(copy, 0, sizeof copy);
            if (at < end) memcpy(copy, at, (size_t)(end - at));
            at = copy;
        }
        if (i + 12 < n) _mm_prefetch((const char *)(c->words + start[i + 12]) + skip, _MM_HINT_T0);
        __m256 f = _mm256_set1_ps(factor[i]);
        __m256 low = _mm256_mul_ps(how.low, f), high = _mm256_mul_ps(how.high, f);
#pragma GCC unroll 8
        for (int k = 0; k < K; k++) {
            __m256 level = eight_levels(&how, levels, low, high, at + k * B, B);
            a[k] = B <= 4 ? _mm256_add_ps(a[k], level) : _mm256_fmadd_ps(level, f, a[k]);
        }
    }
#pragma GCC unroll 8
    for (int k = 0; k < K; k++) sums[k] = a[k];
}

#define ADD_GROUPS(B)                                                                              \
    static __attribute__((noinline)) void add_##B(const cluster_t *c, const float *factors,        \
                                                  i64 row, __m256 *sums, int half) {               \
        if (half)                                                                                  \
            add_groups(c, factors, row, sums, B, 4);                                               \
        else                                                                                       \
            add_groups(c, factors, row, sums, B, 8);                                               \
    }
ADD_GROUPS(1)
ADD_GROUPS(2)
ADD_GROUPS(3)
ADD_GROUPS(4)
ADD_GROUPS(5)
ADD_GROUPS(6)
ADD_GROUPS(7)
ADD_GROUPS(8)
#undef ADD_GROUPS

/* out[r] = sum over the groups of depth `from` .. 8 of factor * level, of n <= 64 rows. */
static void sum_rows(const cluster_t *c, const float *factors, i64 row, i64 n, int from, float *out) {
    static void (*const add[DEPTHS])(const cluster_t *, const float *, i64, __m256 *, int) = {
        NULL, add_1, add_2, add_3, add_4, add_5, add_6, add_7, add_8};
    __m256 sums[8];
    float values[64];
    for (int k = 0; k < 8; k++) sums[k] = _mm256_setzero_ps();
    for (int b = from; b < DEPTHS; b++)
        if (c->count[b]) add[b](c, factors, row, sums, n <= 32);
    for (int k = 0; k < 8; k++) _mm256_storeu_ps(values + 8 * k, sums[k]);
    memcpy(out, values, (size_t)n * 4);
}

#else

static void sum_rows(const cluster_t *c, const float *factors, i64 row, i64 n, int from, float *out) {
    uint32_t codes[64 + 16];
    memset(out, 0, (size_t)n * 4);
    for (int b = from; b < DEPTHS; b++)
        for (i64 i = c->at[b]; i < c->at[b] + c->count[b]; i++) {
            const float *levels = c->w->levels + (1 << b);
            unpack(c->words + c->start[i], ceil_div(b * c->w->group_rows, 32), row, n, b, codes);
            for (i64 r = 0; r < n; r++) out[r] += factors[i] * levels[codes[r]];
        }
}
#endif
#endif
