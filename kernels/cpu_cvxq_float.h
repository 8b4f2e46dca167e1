/* Sums of CVXQ levels in float32, with AVX2 or without: the levels of a depth, times scale and x, are one or
 * two registers, in which the codes of 8 rows are looked up at once. */
#include "cpu_cvxq.h"

#ifdef HF_VQ_AVX2

/* Level table of depth B, at most 16 of them: entries repeat, so that no code needs a mask. */
INLINE __m256 repeated(const float *levels, int B) {
    float table[8];
    for (int i = 0; i < 8; i++) table[i] = levels[i & ((1 << B) - 1)];
    return _mm256_loadu_ps(table);
}

/* sums[k] += factor * level of rows row + 8 k .. row + 8 k + 7, for n groups of depth B. */
INLINE void add_groups(const cluster_t *c, const float *factors, i64 row, __m256 *sums, const int B,
                       const int K) {
    const float *levels = c->w->levels + (1 << B), *factor = factors + c->at[B];
    const uint32_t *start = c->start + c->at[B];
    const uint8_t *end = (const uint8_t *)(c->words + c->left);
    i64 n = c->count[B], skip = row * B / 8, reach = B <= 4 ? (K - 1) * B + 4 : (K - 1) * B + 16;
    __m256 low = repeated(levels, B < 3 ? B : 3);
    __m256 high = B == 4 ? _mm256_loadu_ps(levels + 8) : low;
    __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    __m256i right = _mm256_mullo_epi32(lane, _mm256_set1_epi32(B)), pick = right;
    __m256i left = _mm256_sub_epi32(_mm256_set1_epi32(28), right); /* bit 3 to the sign */
    __m256i mask = _mm256_set1_epi32((1 << B) - 1);
    if (B > 4) { /* code i of 8 starts in byte i * B / 8 of 16 */
        __m256i four = _mm256_setr_epi8(0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3,
                                        0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3);
        pick = _mm256_srli_epi32(right, 3);
        pick = _mm256_mullo_epi32(pick, _mm256_set1_epi32(0x01010101));
        pick = _mm256_add_epi8(pick, four);
        right = _mm256_and_si256(right, _mm256_set1_epi32(7));
    }
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
        __m256 table = _mm256_mul_ps(low, f), upper = B == 4 ? _mm256_mul_ps(high, f) : table;
#pragma GCC unroll 8
        for (int k = 0; k < K; k++) {
            if (B <= 4) {
                int32_t word;
                memcpy(&word, at + k * B, 4);
                __m256i codes = _mm256_set1_epi32(word), code = _mm256_srlv_epi32(codes, right);
                __m256 level = B < 3 ? _mm256_permutevar_ps(table, code)
                                     : _mm256_permutevar8x32_ps(table, code);
                if (B == 4)
                    level = _mm256_blendv_ps(level, _mm256_permutevar8x32_ps(upper, code),
                                             _mm256_castsi256_ps(_mm256_sllv_epi32(codes, left)));
                a[k] = _mm256_add_ps(a[k], level);
            } else {
                __m128i bytes = _mm_loadu_si128((const __m128i *)(at + k * B));
                __m256i code = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(bytes), pick);
                code = _mm256_and_si256(_mm256_srlv_epi32(code, right), mask);
                a[k] = _mm256_fmadd_ps(_mm256_i32gather_ps(levels, code, 4), f, a[k]);
            }
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
