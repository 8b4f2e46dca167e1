/* Sums of CVXQ levels in integers, with AVX2: for bfloat16 and float16 activations.
 *
 * Every group has a table of its levels times its factor (x times scale), numbers of 16 bits of the
 * cluster's largest, plus 2 ** 15. A byte shuffle looks up one of their two bytes for 32 rows. Bytes
 * are summed in lanes of two: as they are, modulo 2 ** 16, and the upper one alone, from which the
 * sum of the lower one follows; after CHUNK groups both are added to sums of 32 bits. */
#include "cpu_cvxq.h"

enum { LAST = 5, CHUNK = 256 }; /* depths of more bits are summed in float */

typedef struct {
    int16_t *room;         /* factor of every slot */
    float largest[DEPTHS]; /* level of a depth */
    int usable;            /* for this cluster */
    float unit;            /* of a sum */
} integers_t;

/* Returns 1 without memory. */
static int make_room(integers_t *n, const cvxq_t *w, int dtype) {
    n->room = NULL;
    if (dtype == FLOAT32 || w->stride > 65000) return 0; /* wider sums could overflow */
    for (int b = 1; b <= LAST; b++) n->largest[b] = w->levels[(2 << b) - 1];
    n->room = allocate(w->stride * 2);
    return !n->room;
}

static void to_integers(integers_t *n, const cluster_t *c, const float *factors) {
    n->usable = 0;
    if (!n->room) return;
    float most = 0, zero = 0;
    for (int b = 1; b <= LAST; b++) {
        float here = 0;
        for (i64 i = c->at[b]; i < c->at[b + 1]; i++) {
            float f = fabsf(factors[i]);
            here = here > f ? here : f;
            zero += 0 * f;
        }
        here *= n->largest[b];
        most = most > here ? most : here;
    }
    if (zero != 0 || !(most > 1e-30f && most < 1e30f)) return; /* NaN, infinite, nothing to add */
    n->unit = most / 32767;
    for (int b = 1; b <= LAST; b++) {
        float scale = 32767 / most * n->largest[b];
        for (i64 i = c->at[b]; i < c->at[b + 1]; i++)
            n->room[i] = (int16_t)lrintf(factors[i] * scale);
    }
    n->usable = 1;
}

/* Of n groups of depth B: 16 low bytes of 16 entries, then their high bytes; with 32 entries, 32. */
INLINE void make_tables(const integers_t *all, const cluster_t *c, i64 slot, i64 n, uint8_t *tables,
                        const int B) {
    const float *levels = c->w->levels + (1 << B);
    int16_t number[32];
    for (int i = 0; i < 32; i++)
        number[i] = (int16_t)lrintf(levels[i & ((1 << B) - 1)] / all->largest[B] * 32767);
    __m256i low = _mm256_loadu_si256((const __m256i *)number);
    __m256i high = _mm256_loadu_si256((const __m256i *)(number + 16));
    __m256i sign = _mm256_set1_epi16(-32768), byte = _mm256_set1_epi16(255);
    for (i64 i = 0; i < n; i++) {
        __m256i f = _mm256_set1_epi16(all->room[slot + i]);
        __m256i t = _mm256_xor_si256(_mm256_mulhrs_epi16(low, f), sign);
        __m256i both = _mm256_packus_epi16(_mm256_and_si256(t, byte), _mm256_srli_epi16(t, 8));
        both = _mm256_permute4x64_epi64(both, 0xd8);
        if (B <= 4) {
            _mm256_store_si256((__m256i *)(tables + 32 * i), both);
            continue;
        }
        t = _mm256_xor_si256(_mm256_mulhrs_epi16(high, f), sign);
        __m256i next = _mm256_packus_epi16(_mm256_and_si256(t, byte), _mm256_srli_epi16(t, 8));
        next = _mm256_permute4x64_epi64(next, 0xd8);
        _mm256_store_si256((__m256i *)(tables + 64 * i), _mm256_permute2x128_si256(both, next, 0x20));
        _mm256_store_si256((__m256i *)(tables + 64 * i + 32),
                           _mm256_permute2x128_si256(both, next, 0x31));
    }
}

#define LOAD(at) _mm_loadu_si128((const __m128i *)(at))
#define TWO(a, b) _mm256_inserti128_si256(_mm256_castsi128_si256(LOAD(a)), LOAD(b), 1)

/* 32 codes of 5 bits from twice 10 bytes. */
INLINE __m256i five_bits(const uint8_t *at) {
    const __m256i pick = _mm256_setr_epi8(0, 1, 1, 2, 2, 3, 3, 4, 5, 6, 6, 7, 7, 8, 8, 9, 0, 1, 1, 2,
                                          2, 3, 3, 4, 5, 6, 6, 7, 7, 8, 8, 9);
    const __m256i left = _mm256_set1_epi64x(0x0001000400100040); /* two codes to bits 6..15 */
    __m256i two = _mm256_mullo_epi16(_mm256_shuffle_epi8(TWO(at, at + 10), pick), left);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi16(two, 3), _mm256_set1_epi16(0x1f00));
    return _mm256_or_si256(_mm256_srli_epi16(two, 6) & _mm256_set1_epi16(0x1f), odd);
}

/* Codes of 64 rows as two times 32 bytes, in the order of `row_of`. */
INLINE void codes_of(const uint8_t *at, __m256i *first, __m256i *second, const int B) {
    __m256i v, mask = _mm256_set1_epi8((1 << B) - 1);
    if (B == 5) {
        *first = five_bits(at);
        *second = five_bits(at + 20);
        return;
    } else if (B == 4) {
        v = _mm256_loadu_si256((const __m256i *)at);
    } else if (B == 3) { /* six bits, two codes, to every byte */
        const __m256i pick = _mm256_setr_epi8(0, 1, 1, 2, 3, 4, 4, 5, 6, 7, 7, 8, 9, 10, 10, 11, 0,
                                              1, 1, 2, 3, 4, 4, 5, 6, 7, 7, 8, 9, 10, 10, 11);
        v = _mm256_shuffle_epi8(TWO(at, at + 12), pick);
        v = _mm256_blend_epi16(v, _mm256_srli_epi16(v, 4), 0xaa);
        __m256i upper = _mm256_and_si256(_mm256_slli_epi16(v, 2), _mm256_set1_epi16(0x3f00));
        v = _mm256_or_si256(_mm256_and_si256(v, _mm256_set1_epi16(0x3f)), upper);
    } else if (B == 2) {
        v = _mm256_broadcastsi128_si256(LOAD(at));
        v = _mm256_srlv_epi64(v, _mm256_setr_epi64x(0, 0, 4, 4));
    } else {
        int64_t word;
        memcpy(&word, at, 8);
        v = _mm256_srlv_epi64(_mm256_set1_epi64x(word), _mm256_setr_epi64x(0, 1, 2, 3));
    }
    *first = _mm256_and_si256(v, mask);
    *second = _mm256_and_si256(_mm256_srli_epi16(v, B == 1 ? 4 : B), mask);
}

/* The row of byte `byte` of register `second` of codes_of. */
INLINE int row_of(int b, int second, int byte) {
    int lane = byte / 16, in_lane = byte % 16;
    switch (b) {
    case 1: return 8 * (byte % 8) + byte / 8 + 4 * second;
    case 2: return 4 * in_lane + 2 * lane + second;
    case 3: return 32 * lane + 2 * in_lane + second;
    case 4: return 2 * byte + second;
    default: return 32 * second + byte;
    }
}

/* Sums of bytes to those of numbers, in 32 bits: even bytes, even and odd ones of these, odd ones. */
INLINE void flush(const __m256i a[4], int32_t less, __m256i *sums) {
    __m256i lower[2] = {_mm256_sub_epi16(a[0], _mm256_slli_epi16(a[1], 8)), a[1]};
    __m256i upper[2] = {_mm256_sub_epi16(a[2], _mm256_slli_epi16(a[3], 8)), a[3]};
    __m256i mask = _mm256_set1_epi32(0xffff), mean = _mm256_set1_epi32(less);
    for (int odd = 0; odd < 2; odd++) {
        __m256i low = _mm256_and_si256(lower[odd], mask), high = _mm256_and_si256(upper[odd], mask);
        __m256i sum = _mm256_add_epi32(low, _mm256_slli_epi32(high, 8));
        sums[2 * odd] = _mm256_add_epi32(sums[2 * odd], _mm256_sub_epi32(sum, mean));
        low = _mm256_srli_epi32(lower[odd], 16);
        high = _mm256_srli_epi32(upper[odd], 16);
        sum = _mm256_add_epi32(low, _mm256_slli_epi32(high, 8));
        sums[2 * odd + 1] = _mm256_add_epi32(sums[2 * odd + 1], _mm256_sub_epi32(sum, mean));
    }
}

/* Adds n <= CHUNK groups of depth B to the sums of the 64 rows from `row` on. */
INLINE void add_bytes(const cluster_t *c, const uint8_t *tables, i64 slot, i64 n, i64 row,
                      __m256i sums[8], const int B) {
    const uint32_t *start = c->start + slot;
    const uint8_t *words = (const uint8_t *)c->words + row * B / 8;
    const i64 reach = B == 3 ? 28 : B == 5 ? 46 : 8 * B, end = 4 * c->left - row * B / 8 - reach;
    __m256i a[8];
#pragma GCC unroll 8
    for (int k = 0; k < 8; k++) a[k] = _mm256_setzero_si256();
    for (i64 i = 0; i < n; i++) {
        i64 from = 4 * (i64)start[i];
        const uint8_t *at = words + from;
        uint8_t copy[64];
        if (from > end) { /* the last group of all */
            memset(copy, 0, sizeof copy);
            if (from < end + reach) memcpy(copy, at, (size_t)(end + reach - from));
            at = copy;
        }
        _mm_prefetch((const char *)words + 4 * (i64)start[i + 12], _MM_HINT_T0);
        __m256i codes[2];
        codes_of(at, codes, codes + 1, B);
        const uint8_t *table = tables + (B <= 4 ? 32 : 64) * i;
#pragma GCC unroll 2
        for (int k = 0; k < 2; k++) {
#pragma GCC unroll 2
            for (int high = 0; high < 2; high++) {
                __m256i bytes, *to = a + 4 * k + 2 * high;
                if (B <= 4) {
                    bytes = _mm256_shuffle_epi8(
                        _mm256_broadcastsi128_si256(LOAD(table + 16 * high)), codes[k]);
                } else {
                    __m256i low = _mm256_broadcastsi128_si256(LOAD(table + 32 * high));
                    __m256i up = _mm256_broadcastsi128_si256(LOAD(table + 32 * high + 16));
                    bytes = _mm256_blendv_epi8(_mm256_shuffle_epi8(low, codes[k]),
                                               _mm256_shuffle_epi8(up, codes[k]),
                                               _mm256_slli_epi16(codes[k], 3));
                }
                to[0] = _mm256_add_epi16(to[0], bytes);
                to[1] = _mm256_add_epi16(to[1], _mm256_srli_epi16(bytes, 8));
            }
        }
    }
    flush(a, (int32_t)n << 15, sums);
    flush(a + 4, (int32_t)n << 15, sums + 4);
}
#undef LOAD
#undef TWO

/* out[r] += sums of the groups of depth B, of up to 128 rows from `row` on. */
INLINE void add_depth(const integers_t *all, const cluster_t *c, i64 row, float *out, const int B) {
    uint8_t tables[CHUNK * (B <= 4 ? 32 : 64)] __attribute__((aligned(64)));
    __m256i sums[2][8];
    i64 halves = c->w->group_rows - row > 64 ? 2 : 1;
    memset(sums, 0, sizeof sums);
    for (i64 i = 0; i < c->count[B]; i += CHUNK) {
        i64 n = smaller(CHUNK, c->count[B] - i), slot = c->at[B] + i;
        make_tables(all, c, slot, n, tables, B);
        for (i64 h = 0; h < halves; h++)
            add_bytes(c, tables, slot, n, row + 64 * h, sums[h], B);
    }
    for (i64 h = 0; h < halves; h++)
        for (int i = 0; i < 64; i++) { /* second register, odd byte, odd of these, lane */
            int32_t sum = ((const int32_t *)sums[h])[i];
            int byte = 2 * (2 * (i % 8) + i / 8 % 2) + i / 16 % 2;
            out[64 * h + row_of(B, i / 32, byte)] += all->unit * (float)sum;
        }
}

#define ADD_DEPTH(B)                                                                               \
    static __attribute__((noinline)) void depth_##B(const integers_t *all, const cluster_t *c,     \
                                                    i64 row, float *out) {                         \
        add_depth(all, c, row, out, B);                                                            \
    }
ADD_DEPTH(1)
ADD_DEPTH(2)
ADD_DEPTH(3)
ADD_DEPTH(4)
ADD_DEPTH(5)
#undef ADD_DEPTH

/* Sums of up to 128 rows from `row` on, of all groups up to a depth; returns the next depth. */
static int sum_integers(const integers_t *n, const cluster_t *c, i64 row, float *sums) {
    static void (*const add[LAST + 1])(const integers_t *, const cluster_t *, i64, float *) = {
        NULL, depth_1, depth_2, depth_3, depth_4, depth_5};
    if (!n->usable) return 1;
    memset(sums, 0, 128 * 4);
    for (int b = 1; b <= LAST; b++)
        if (c->count[b]) add[b](n, c, row, sums);
    return c->count[6] + c->count[7] + c->count[8] ? LAST + 1 : DEPTHS;
}
