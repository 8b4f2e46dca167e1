/* A packed VPTQ matrix; the ctypes structure in cpu_vptq.py has the same fields. */
#ifndef HF_VQ_CPU_VPTQ_H
#define HF_VQ_CPU_VPTQ_H
#include "cpu_common.h"

typedef struct {
    const int32_t *indices;          /* (groups, blocks, words) */
    const float *books, *res_books;  /* (groups, K or R, width), res_books or NULL */
    const uint16_t *half_books;      /* for hf_vq_vptq_linear: as float16, width 8, not `books`; or NULL */
    const uint16_t *books16;         /* for hf_vq_vptq_linear: (groups, K, width16), see cpu_vptq_vnni.h */
    const int16_t *res_books16;      /* (groups, R, width16), or NULL */
    const float *units16;            /* (groups,), of books16 and res_books16 */
    const int16_t *outlier_indices;  /* (outlier_blocks, outliers), or NULL */
    const float *outlier_books;      /* (K0, outlier_width) */
    const int16_t *perm;             /* (columns,), or NULL */
    const float *scale, *offset;     /* one per column, or per row with norm_rows, or NULL */
    i64 rows, columns, groups, main_bits, res_bits, entries, res_entries;
    i64 vector_dim, width, width16, outliers, outlier_dim, outlier_width, norm_rows;
} vptq_t;

/* The words of a row of codes: of block `block` in a group. */
INLINE const uint32_t *codes_of_block(const vptq_t *w, i64 group, i64 block, i64 *words) {
    i64 blocks = ceil_div(w->rows, w->vector_dim), per_group = (w->columns - w->outliers) / w->groups;
    *words = ceil_div(per_group * (w->main_bits + w->res_bits), 32);
    return (const uint32_t *)w->indices + (group * blocks + block) * *words;
}
#endif
