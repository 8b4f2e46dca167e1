/* Decoding of CVXQ: groups to float, one after another of a depth. */
#include "cpu_cvxq.h"
#include "cpu_cvxq_float.h"

/* Rows row .. row + n - 1 of group i, of depth B, to out, which has room for n rounded up to 8.
 * `row` is 0 or a multiple of 32. The level times the scale is rounded before the location is added. */
INLINE void decode_rows(const cluster_t *c, i64 i, i64 row, i64 n, float *out, const int B) {
    float scale = c->scale[i], location = c->location ? c->location[i] : 0;
    const float *levels = c->w->levels + (1 << B);
    if (B == 0) {
        for (i64 r = 0; r < n; r++) out[r] = location;
        return;
    }
#ifdef HF_VQ_AVX2
    const lookup_t how = lookup(levels, B);
    const uint8_t *at = (const uint8_t *)(c->words + c->start[i]) + row * B / 8;
    const uint8_t *end = (const uint8_t *)(c->words + c->left);
    __m256 f = _mm256_set1_ps(scale), shift = _mm256_set1_ps(location);
    __m256 low = _mm256_mul_ps(how.low, f), high = _mm256_mul_ps(how.high, f);
    i64 spare = end - at - (B <= 4 ? 4 : 16);
    i64 safe = spare < 0 ? -1 : spare / B * 8; /* the last row whose read ends before the words do */
    for (i64 r = 0; r < n; r += 8, at += B) {
        uint8_t copy[16];
        const uint8_t *from = at;
        if (r > safe) {
            memset(copy, 0, sizeof copy);
            if (at < end) memcpy(copy, at, (size_t)smaller(end - at, 16));
            from = copy;
        }
        __m256 value = eight_levels(&how, levels, low, high, from, B);
        if (B > 4) value = _mm256_mul_ps(value, f);
        __asm__("" : "+x"(value)); /* no fused multiply-add */
        if (c->location) value = _mm256_add_ps(value, shift);
        _mm256_storeu_ps(out + r, value);
    }
#else
    uint32_t codes[32 + 16];
    for (i64 r = 0; r < n; r += 32) {
        i64 some = smaller(32, n - r);
        unpack(c->words + c->start[i], ceil_div(B * c->w->group_rows, 32), row + r, some, B, codes);
        for (i64 k = 0; k < some; k++) {
            volatile float value = scale * levels[codes[k]]; /* no fused multiply-add */
            out[r + k] = c->location ? value + location : value;
        }
    }
#endif
}

/* The groups from cursor[b] on of every depth b whose columns are below `end`: that of column j to
 * out[(j - column) * stride]. Moves the cursors on. */
static void decode_columns(const cluster_t *c, i64 cursor[DEPTHS], i64 column, i64 end, i64 row,
                           i64 n, float *out, i64 stride) {
#define DECODE(B)                                                                                  \
    for (; cursor[B] < c->at[B] + c->count[B]; cursor[B]++) {                                      \
        i64 j = column_of(c, cursor[B]);                                                           \
        if (j >= end) break;                                                                       \
        decode_rows(c, cursor[B], row, n, out + (j - column) * stride, B);                         \
    }
    DECODE(0) DECODE(1) DECODE(2) DECODE(3) DECODE(4) DECODE(5) DECODE(6) DECODE(7) DECODE(8)
#undef DECODE
}
