/* Sums of CVXQ levels in integers, with AVX-512 VBMI and VNNI: for bfloat16 and float16 activations.
 *
 * Four groups of one depth are read together. Levels are numbers of 16 bits of the largest level of
 * their depth, factors (x times scale times that largest level) numbers of 16 bits of the cluster's
 * largest, both as two bytes; one register holds a byte of all levels of a depth. Codes of 16 rows
 * of the four groups become 64 bytes, two byte shuffles look their levels up, and byte dot products
 * add level times factor of the four groups to the sum of their row. The product of the two low
 * bytes is left out but for its mean. Sums are exact until the cluster ends. */
#include "cpu_cvxq.h"

typedef struct {
    uint32_t *room; /* factors, per four slots: the high bytes, then all low bytes */
    i64 slots;
    float largest[DEPTHS]; /* level of a depth */
    int usable;            /* for this cluster */
    float unit;            /* of a sum of products of high bytes */
    int32_t high, low;     /* sums of the factors' bytes */
} integers_t;

enum { LAST = 6 }; /* depths of more bits are summed in float */

/* Returns 1 without memory. */
static int make_room(integers_t *n, const cvxq_t *w, int dtype) {
    n->room = NULL;
    if (dtype == FLOAT32 || w->stride > 32000) return 0; /* wider sums could overflow */
    for (int b = 1; b <= LAST; b++) n->largest[b] = w->levels[(2 << b) - 1];
    n->slots = w->stride / PADDED + 16;
    n->room = allocate(n->slots * 2 * 4);
    return !n->room;
}

INLINE __mmask16 first_lanes(i64 n) { return (__mmask16)(n < 16 ? (1u << n) - 1 : 0xffff); }

static void to_integers(integers_t *n, const cluster_t *c, const float *factors) {
    n->usable = 0;
    if (!n->room) return;
    float most = 0;
    __mmask16 unordered = 0;
    for (int b = 1; b <= LAST; b++) {
        __m512 top = _mm512_setzero_ps();
        for (i64 i = c->at[b]; i < c->at[b + 1]; i += 16) {
            __m512 f = _mm512_maskz_loadu_ps(first_lanes(c->at[b + 1] - i), factors + i);
            unordered |= _mm512_cmp_ps_mask(f, f, _CMP_UNORD_Q);
            top = _mm512_max_ps(top, _mm512_abs_ps(f));
        }
        float here = _mm512_reduce_max_ps(top) * n->largest[b];
        if (here > most) most = here;
    }
    if (unordered) return;
    if (!(most > 1e-30f && most < 1e30f)) return; /* nothing to add, or infinite */
    n->unit = most / 32639 / 32767.5f * 65536;
    __m512i high_sum = _mm512_setzero_si512(), low_sum = high_sum;
    uint8_t *high = (uint8_t *)n->room, *low = (uint8_t *)(n->room + n->slots);
    for (int b = 1; b <= LAST; b++) {
        __m512 scale = _mm512_set1_ps(32639 / most * n->largest[b]);
        for (i64 i = c->at[b]; i < c->at[b + 1]; i += 16) {
            __m512 f = _mm512_maskz_loadu_ps(first_lanes(c->at[b + 1] - i), factors + i);
            f = _mm512_mul_ps(f, scale);
            __m512i all = _mm512_cvtps_epi32(f);
            __m512i upper = _mm512_srai_epi32(_mm512_add_epi32(all, _mm512_set1_epi32(128)), 8);
            __m512i lower = _mm512_sub_epi32(all, _mm512_slli_epi32(upper, 8));
            high_sum = _mm512_add_epi32(high_sum, upper);
            low_sum = _mm512_add_epi32(low_sum, lower);
            _mm_storeu_si128((__m128i *)(high + i), _mm512_cvtepi32_epi8(upper));
            _mm_storeu_si128((__m128i *)(low + i), _mm512_cvtepi32_epi8(lower));
        }
    }
    n->high = _mm512_reduce_add_epi32(high_sum);
    n->low = _mm512_reduce_add_epi32(low_sum);
    n->usable = 1;
}

/* Adds the groups of depth B to the sums of ROWS rows from `row` on: `high` of the products of high
 * bytes, `mixed` of those of a high and a low byte. */
INLINE void add_bytes(const integers_t *n, const cluster_t *c, i64 row, __m512i *high,
                      __m512i *mixed, const int B, const int ROWS) {
    const int fit = B == 1 ? 128 : B == 2 ? 64 : B <= 4 ? 32 : 16; /* rows whose codes are 16 bytes */
    const int rows = fit < ROWS ? fit : ROWS, units = rows / 16;
    const float *levels = c->w->levels + (1 << B);
    uint8_t pick[8][64], shift[64], table[2][64];
    for (int i = 0; i < 64; i++) { /* byte i: rows 2 (i / 8) and the next, of four groups each */
        int at = i / 8 * 2 * B;
        for (int u = 0; u < units; u++) /* two bytes of each group to every eight bytes */
            pick[u][i] = (uint8_t)(i % 8 / 2 * 16 + u * 2 * B + (at >> 3) + i % 2);
        shift[i] = (uint8_t)(i % 4 * 16 + (at & 7) + i % 8 / 4 * B);
        float level = levels[i & ((1 << B) - 1)] / n->largest[B]; /* -1 to 1 */
        int number = (int)lrintf(level * 32767.5f + 32767.5f);
        table[0][i] = (uint8_t)(number & 255);
        table[1][i] = (uint8_t)(number >> 8);
    }
    __m512i shifts = _mm512_loadu_si512(shift), picks[8], h[8], x[8];
    __m512i low_levels = _mm512_loadu_si512(table[0]), high_levels = _mm512_loadu_si512(table[1]);
#pragma GCC unroll 8
    for (int u = 0; u < units; u++) picks[u] = _mm512_loadu_si512(pick[u]);
#pragma GCC unroll 8
    for (int u = 0; u < ROWS / 16; u++) h[u] = high[u], x[u] = mixed[u];
    const uint32_t *start = c->start + c->at[B];
    const uint32_t *high_factors = n->room + c->at[B] / PADDED;
    const uint32_t *low_factors = high_factors + n->slots;
    const uint8_t *words = (const uint8_t *)c->words + row * B / 8;
    enum { MOST = 128 / 8 * LAST + 16 };
    const i64 reach = (ROWS - rows) * B / 8 + 16, end = 4 * c->left - row * B / 8;
    uint8_t copies[PADDED][MOST];
    for (i64 q = 0; q < (c->at[B + 1] - c->at[B]) / PADDED; q++, start += PADDED) {
        const uint8_t *codes[PADDED];
        for (int i = 0; i < PADDED; i++) {
            codes[i] = words + 4 * (i64)start[i];
            _mm_prefetch((const char *)words + 4 * (i64)start[3 * PADDED + i], _MM_HINT_T0);
        }
        if (4 * (i64)start[PADDED - 1] + reach > end) /* starts increase: near the end of all words */
            for (int i = 0; i < PADDED; i++) {
                i64 there = smaller(end - 4 * (i64)start[i], MOST);
                memset(copies[i], 0, MOST);
                if (there > 0) memcpy(copies[i], codes[i], (size_t)there);
                codes[i] = copies[i];
            }
        __m512i f = _mm512_set1_epi32((int)high_factors[q]), g = _mm512_set1_epi32((int)low_factors[q]);
#pragma GCC unroll 8
        for (int k = 0; k < ROWS / rows; k++) {
            const int skip = k * rows * B / 8;
#define CODES(i) _mm_loadu_si128((const __m128i *)(codes[i] + skip))
            __m512i four = _mm512_zextsi128_si512(CODES(0));
            four = _mm512_mask_broadcast_i32x4(four, 0x00f0, CODES(1));
            four = _mm512_mask_broadcast_i32x4(four, 0x0f00, CODES(2));
            four = _mm512_mask_broadcast_i32x4(four, 0xf000, CODES(3));
#undef CODES
#pragma GCC unroll 8
            for (int v = 0; v < units; v++) {
                const int u = k * units + v;
                __m512i code = _mm512_permutexvar_epi8(picks[v], four);
                code = _mm512_multishift_epi64_epi8(shifts, code); /* the shuffle ignores 2 bits, */
                __m512i upper = _mm512_permutexvar_epi8(code, high_levels); /* tables repeat */
                __m512i lower = _mm512_permutexvar_epi8(code, low_levels);
                h[u] = _mm512_dpbusd_epi32(h[u], upper, f);
                x[u] = _mm512_dpbusd_epi32(x[u], upper, g);
                x[u] = _mm512_dpbusd_epi32(x[u], lower, f);
            }
        }
    }
#pragma GCC unroll 8
    for (int u = 0; u < ROWS / 16; u++) high[u] = h[u], mixed[u] = x[u];
}

#define ADD_BYTES(B)                                                                               \
    static __attribute__((noinline)) void bytes_##B(const integers_t *n, const cluster_t *c,       \
                                                    i64 row, __m512i *high, __m512i *mixed) {      \
        if (c->w->group_rows - row > 64)                                                           \
            add_bytes(n, c, row, high, mixed, B, 128);                                             \
        else                                                                                       \
            add_bytes(n, c, row, high, mixed, B, 64);                                              \
    }
ADD_BYTES(1)
ADD_BYTES(2)
ADD_BYTES(3)
ADD_BYTES(4)
ADD_BYTES(5)
ADD_BYTES(6)
#undef ADD_BYTES

/* Sums of 128 rows from `row` on, of all groups up to a depth; returns the next depth. */
static int sum_integers(const integers_t *n, const cluster_t *c, i64 row, float *sums) {
    static void (*const add[LAST + 1])(const integers_t *, const cluster_t *, i64, __m512i *,
                                       __m512i *) = {NULL,    bytes_1, bytes_2, bytes_3,
                                                     bytes_4, bytes_5, bytes_6};
    if (!n->usable) return 1;
    __m512i high[8], mixed[8];
    for (int u = 0; u < 8; u++) high[u] = mixed[u] = _mm512_setzero_si512();
    for (int b = 1; b <= LAST; b++)
        if (c->count[b]) add[b](n, c, row, high, mixed);
    /* twice a level's bytes less 255 are its signed ones */
    __m512i high_mean = _mm512_set1_epi32(255 * n->high);
    __m512i mixed_mean = _mm512_set1_epi32(255 * (n->high + n->low));
    __m512 unit = _mm512_set1_ps(n->unit / 2);
    for (int u = 0; u < 8; u++) {
        __m512i whole = _mm512_sub_epi32(_mm512_slli_epi32(high[u], 1), high_mean);
        __m512i part = _mm512_sub_epi32(_mm512_slli_epi32(mixed[u], 1), mixed_mean);
        __m512 sum = _mm512_mul_ps(_mm512_cvtepi32_ps(part), _mm512_set1_ps(1.0f / 256));
        sum = _mm512_mul_ps(_mm512_add_ps(sum, _mm512_cvtepi32_ps(whole)), unit);
        _mm512_storeu_ps(sums + 16 * u, sum);
    }
    return c->count[7] + c->count[8] ? LAST + 1 : DEPTHS;
}
