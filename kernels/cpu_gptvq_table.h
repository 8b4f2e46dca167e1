/* GPTVQ times one vector by a table of what each byte of codes stands for: 256 times the entries of
 * its 8 / bits codes, 4 KB for 2-D codes of 4 bits or 4-D codes of 8. One load and one multiply-add
 * serve a byte of one row; eight rows share an entry of x. Plain C, sums in single precision. */
#ifndef HF_VQ_CPU_GPTVQ_TABLE_H
#define HF_VQ_CPU_GPTVQ_TABLE_H
#include "cpu_gptvq.h"

enum { TABLE_FLOATS = 16 * 256, TABLE_ROWS = 256, ROWS_AT_ONCE = 8 };

typedef struct {
    const gptvq_t *w;
    const float *scales, *x; /* x: padded with zeros to whole bytes of codes */
    float *y;
} table_task_t;

/* Codebook (stripe, group) as floats (k, d): in place, or expanded to `room`. */
static const float *codebook(const gptvq_t *w, i64 stripe, i64 group, float *room) {
    i64 groups = ceil_div(w->rows, w->group_rows);
    i64 size = w->num_centroids * w->vector_dim, at = stripe * groups + group;
    if (w->books) return w->books + at * size;
    const int8_t *stored = w->books8 + at * size;
    float scale = w->book_scales ? w->book_scales[at] : 1;
    for (i64 e = 0; e < size; e++) room[e] = (float)stored[e] * scale;
    return room;
}

INLINE void fill_table(const float *books, i64 k, int bits, i64 d, float *table) {
    i64 codes = 8 / bits;
    for (i64 byte = 0; byte < 256; byte++)
        for (i64 c = 0; c < codes; c++) {
            i64 code = byte >> c * bits & ((1 << bits) - 1);
            memcpy(table + (byte * codes + c) * d, books + smaller(code, k - 1) * d, (size_t)d * 4);
        }
}

/* (256, 8 / bits * d), for 1, 2, 4 or 8 bits */
static void byte_table(const float *books, i64 k, int bits, i64 d, float *table) {
    if (bits == 4 && d == 2) fill_table(books, k, 4, 2, table);
    else fill_table(books, k, bits, d, table);
}

/* Floats of a byte, or 0 where codes cross bytes or there are too many. */
static i64 floats_of_byte(const gptvq_t *w) {
    int bits = bits_of(w->num_centroids);
    i64 each = bits && 8 % bits == 0 ? 8 / bits * w->vector_dim : 0;
    return each == 2 || each == 4 || each == 8 || each == 16 ? each : 0;
}

static int table_suits(const gptvq_t *w) {
    i64 each = floats_of_byte(w), stripes = ceil_div(w->columns, w->group_columns);
    if (!each || (stripes > 1 && w->group_columns % (each < 4 ? 4 : each))) return 0;
    return w->scale_block % (each < 4 ? 4 : each) == 0;
}

/* acc[r] += the n bytes of each row, looked up, times x. */
INLINE void look_up(const uint8_t *bytes, i64 stride, i64 n, const float *table, const float *x,
                    f4 *acc, const int rows, const uint64_t each) {
    f4 sum[ROWS_AT_ONCE];
    for (int r = 0; r < rows; r++) sum[r] = acc[r];
    if (each == 2) {
        for (i64 i = 0; i < n; i += 2, x += 4)
            for (int r = 0; r < rows; r++) {
                const uint8_t *two = bytes + r * stride + i;
                f4 entry;
                memcpy(&entry, table + 2 * (uint64_t)two[0], 8);
                memcpy((float *)&entry + 2, table + 2 * (uint64_t)two[1], 8);
                sum[r] += entry * *(const f4 *)x;
            }
    } else {
        for (i64 i = 0; i < n; i++, x += each)
            for (int r = 0; r < rows; r++) {
                const float *entry = table + (uint64_t)bytes[r * stride + i] * each;
                for (uint64_t p = 0; p < each; p += 4) sum[r] += *(const f4 *)(entry + p) * *(const f4 *)(x + p);
            }
    }
    for (int r = 0; r < rows; r++) acc[r] = sum[r];
}

INLINE void look_up_any(const uint8_t *bytes, i64 stride, i64 n, const float *table, const float *x,
                        f4 *acc, const int rows, i64 each) {
    switch (each) {
    case 2: look_up(bytes, stride, n, table, x, acc, rows, 2); break;
    case 4: look_up(bytes, stride, n, table, x, acc, rows, 4); break;
    case 8: look_up(bytes, stride, n, table, x, acc, rows, 8); break;
    default: look_up(bytes, stride, n, table, x, acc, rows, 16);
    }
}

static int table_rows_of_thread(const void *context, i64 thread, i64 threads) {
    const table_task_t *task = context;
    const gptvq_t *w = task->w;
    int bits = bits_of(w->num_centroids);
    i64 d = w->vector_dim, each = floats_of_byte(w), B = w->scale_block;
    i64 words = ceil_div(ceil_div(w->columns, d) * bits, 32), stride = words * 4;
    i64 scale_words = B ? ceil_div(ceil_div(w->columns, B) * 4, 32) : 0;
    i64 low = w->rows * thread / threads, high = w->rows * (thread + 1) / threads;
    float *room = allocate((w->books ? 0 : w->num_centroids * d) * 4);
    float *filled = allocate(TABLE_FLOATS * 4);
    if (!room || !filled) return 1;
    for (i64 row = low, n; row < high; row += n) {
        f4 acc[TABLE_ROWS] = {{0}};
        i64 group = row / w->group_rows;
        n = smaller(smaller(TABLE_ROWS, high - row), (group + 1) * w->group_rows - row);
        for (i64 j = 0; j < w->columns; j += w->group_columns) {
            const float *table = codebook(w, j / w->group_columns, group, room);
            if (bits < 8 || w->num_centroids < 256) {
                byte_table(table, w->num_centroids, bits, d, filled);
                table = filled;
            }
            i64 end = smaller(j + w->group_columns, w->columns);
            for (i64 r = 0; r < n; r += ROWS_AT_ONCE) {
                i64 rows = smaller(ROWS_AT_ONCE, n - r);
                const uint8_t *codes = (const uint8_t *)w->indices + (row + r) * stride;
                for (i64 c = j, next; c < end; c = next) {
                    next = B ? smaller((c / B + 1) * B, end) : end;
                    i64 count = ceil_div(next - c, each);
                    f4 part[ROWS_AT_ONCE] = {{0}}, *to = B ? part : acc + r;
                    if (rows == ROWS_AT_ONCE)
                        look_up_any(codes + c / each, stride, count, table, task->x + c, to, ROWS_AT_ONCE, each);
                    else
                        for (i64 i = 0; i < rows; i++)
                            look_up_any(codes + i * stride + c / each, stride, count, table, task->x + c, to + i, 1, each);
                    for (i64 i = 0; i < rows && B; i++) {
                        i64 t = c / B;
                        const uint32_t *stream = (const uint32_t *)w->scale_codes + (row + r + i) * scale_words;
                        acc[r + i] += part[i] * task->scales[16 * t + (stream[t / 8] >> t % 8 * 4 & 15)];
                    }
                }
            }
        }
        for (i64 r = 0; r < n; r++)
            task->y[row + r] = (acc[r][0] + acc[r][1]) + (acc[r][2] + acc[r][3]);
    }
    free(room);
    free(filled);
    return 0;
}

/* y = W x for one vector, if table_suits(w). Returns 0, or 1 without memory. */
static int table_linear(const gptvq_t *w, const float *scales, const float *x, float *y,
                        i64 threads) {
    float *padded = allocate((w->columns + 64) * 4);
    if (!padded) return 1;
    memcpy(padded, x, (size_t)w->columns * 4);
    memset(padded + w->columns, 0, 64 * 4);
    table_task_t task = {w, scales, padded, y};
    int failed = parallel(table_rows_of_thread, &task, threads);
    free(padded);
    return failed;
}
#endif
