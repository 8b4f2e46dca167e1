/* A packed GPTVQ matrix; the ctypes structure in cpu_gptvq.py has the same fields. */
#ifndef HF_VQ_CPU_GPTVQ_H
#define HF_VQ_CPU_GPTVQ_H
#include "cpu_common.h"

typedef struct {
    const int32_t *indices;
    const int8_t *books8;     /* (stripes, groups, k, d), or NULL: then `books` */
    const float *books;       /* the same, decoded */
    const float *book_scales; /* (stripes, groups), with books8, or NULL */
    const int32_t *scale_codes;
    const float *scale_grid; /* (2, blocks) */
    i64 rows, columns, vector_dim, num_centroids, group_rows, group_columns, scale_block;
    i64 log_scales;
} gptvq_t;

/* Floats that `expand_scales` writes per row: the blocks, and room to read a register from any. */
INLINE i64 scale_stride(const gptvq_t *w) {
    return w->scale_block ? ceil_div(w->columns, w->scale_block) + 16 : 0;
}

/* The scales of blocks first .. end - 1 of a row, from the table of scale_table, to out[first] on. */
INLINE void expand_scales(const gptvq_t *w, const float *table, i64 row, i64 first, i64 end, float *out) {
    i64 blocks = ceil_div(w->columns, w->scale_block), words = ceil_div(blocks * 4, 32), t = first;
    const uint32_t *codes = (const uint32_t *)w->scale_codes + row * words;
    for (; t % 8 && t < end; t++) out[t] = table[16 * t + (codes[t / 8] >> t % 8 * 4 & 15)];
#ifdef HF_VQ_VBMI
    const __m512i down = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
    const __m512i own = _mm512_setr_epi32(0, 16, 32, 48, 64, 80, 96, 112, 128, 144, 160, 176, 192, 208, 224, 240);
    for (; t + 16 <= end; t += 16) {
        __m512i word = _mm512_mask_set1_epi32(_mm512_set1_epi32((int)codes[t / 8]), 0xff00,
                                              (int)codes[t / 8 + 1]);
        __m512i code = _mm512_and_si512(_mm512_srlv_epi32(word, down), _mm512_set1_epi32(15));
        _mm512_storeu_ps(out + t, _mm512_i32gather_ps(_mm512_add_epi32(code, own), table + 16 * t, 4));
    }
#endif
    for (; t + 8 <= end; t += 8) {
        uint32_t word = codes[t / 8];
        for (i64 k = 0; k < 8; k++) out[t + k] = table[16 * (t + k) + (word >> 4 * k & 15)];
    }
    for (; t < end; t++) out[t] = table[16 * t + (codes[t / 8] >> t % 8 * 4 & 15)];
}
#endif
