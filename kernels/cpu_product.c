/* Products of many tokens by decoded blocks: cpu_product.h says what for. */
#include "cpu_product.h"
#include "cpu_amx.h"
#include "cpu_fma.h"

/* At most so many tokens at once: their sums for a block of rows stay in the second-level cache. */
enum { MOST_TOKENS = 256, BLOCK_ROWS = 96 };
/* Of a block along columns: it stays in the first-level cache, which single numbers are read from. */
enum { ACROSS_COLUMNS = 64 };

typedef struct {
    const product_t *task;
    i64 first, tokens, room; /* tokens of this pass; rounded up to whole panels or tiles */
    int tiles;
    void *x; /* packed */
} pass_t;

/* x, tokens of this pass: a share of the columns per thread. */
static int pack_of_thread(const void *context, i64 thread, i64 threads) {
    const pass_t *pass = context;
    const product_t *task = pass->task;
    i64 all = ceil_div(task->columns, PACK_COLUMNS);
    i64 low = all * thread / threads * PACK_COLUMNS;
    i64 high = smaller(all * (thread + 1) / threads * PACK_COLUMNS, task->columns);
    float values[PACK_COLUMNS];
    for (i64 t = 0; t < pass->room; t++) {
        for (i64 j = low; j < high; j += PACK_COLUMNS) {
            i64 n = smaller(PACK_COLUMNS, high - j);
            memset(values, 0, sizeof values);
            if (t < pass->tokens) {
                i64 at = (pass->first + t) * task->columns;
                if (task->perm)
                    for (i64 i = 0; i < n; i++)
                        load(task->x, at + (uint16_t)task->perm[j + i], task->dtype, values + i, 1);
                else load(task->x, at + j, task->dtype, values, n);
                if (task->factor)
                    for (i64 i = 0; i < n; i++)
                        values[i] *= task->factor[task->perm ? (uint16_t)task->perm[j + i] : j + i];
            }
            if (pass->tiles) amx_pack(pass->x, task->columns, task->across, t, j, values);
            else fma_pack(pass->x, task->columns, pass->tokens, t, j, n, values);
        }
    }
    return 0;
}

/* Sums of n rows to y: `sums` is (rows, stride) over tokens, or (tokens, stride) over rows. */
static void finish(const pass_t *pass, i64 row, i64 n, const float *sums, i64 stride, int by_token,
                   float *line) {
    const product_t *task = pass->task;
    for (i64 t = 0; t < pass->tokens; t++) {
        i64 token = pass->first + t;
        if (by_token) memcpy(line, sums + t * stride, (size_t)n * 4);
        else
            for (i64 r = 0; r < n; r++) line[r] = sums[r * stride + t];
        if (task->row_factor)
            for (i64 r = 0; r < n; r++) line[r] *= task->row_factor[row + r];
        if (task->shift) {
            float shift = task->shift[token];
            for (i64 r = 0; r < n; r++)
                line[r] += task->row_offset ? shift * task->row_offset[row + r] : shift;
        }
        if (task->bias)
            for (i64 r = 0; r < n; r++) line[r] += task->bias[row + r];
        store(task->y, token * task->rows + row, task->dtype, line, n);
    }
}

/* Every threads-th block of rows. */
static int blocks_of_thread(const void *context, i64 thread, i64 threads) {
    const pass_t *pass = context;
    const product_t *task = pass->task;
    i64 step = task->row_step, columns = task->columns;
    i64 most = ceil_div(BLOCK_ROWS, step) * step;
    while (most > step && ceil_div(task->rows, most) < 2 * threads) most = ceil_div(most / step, 2) * step;
    i64 padded = ceil_div(most, 48) * 48; /* whole tiles of 16, and of what cpu_fma.h has */
    i64 stride = task->across ? padded + 16 : PRODUCT_COLUMNS + 16; /* no power of two */
    int by_token = pass->tiles && task->across;
    i64 sums_stride = by_token ? padded : pass->room;
    i64 at_once = task->across && !pass->tiles ? ACROSS_COLUMNS : PRODUCT_COLUMNS;
    i64 block_floats = task->across ? stride * at_once : stride * padded;
    float *block = allocate(block_floats * 4), *sums = allocate(padded * pass->room * 4);
    float *line = allocate(padded * 4);
    void *scratch = allocate(task->scratch_bytes);
    uint16_t *tiles = allocate(pass->tiles ? padded * PRODUCT_COLUMNS * 2 : 0);
    int failed = !block || !sums || !line || !scratch || !tiles;
    if (!failed) memset(block, 0, (size_t)block_floats * 4); /* rows that pad are computed too */
    if (!failed && pass->tiles) amx_begin();
    for (i64 row = thread * most; row < task->rows && !failed; row += threads * most) {
        i64 n = smaller(most, task->rows - row);
        memset(sums, 0, (size_t)(padded * pass->room) * 4);
        for (i64 j = 0; j < columns; j += at_once) {
            i64 k = smaller(at_once, columns - j);
            task->decode(task->matrix, row, n, j, k, block, stride, scratch);
            if (pass->tiles) {
                amx_round(block, stride, task->across, n, k, tiles);
                amx_multiply(tiles, n, k, pass->x, pass->room, columns, j, task->across, sums,
                             sums_stride);
            } else {
                fma_multiply(block, task->across, stride, n, k, pass->x, columns, j, pass->tokens,
                             sums, sums_stride);
            }
        }
        finish(pass, row, n, sums, sums_stride, by_token, line);
    }
    if (!failed && pass->tiles) amx_end();
    free(block);
    free(sums);
    free(line);
    free(scratch);
    free(tiles);
    return failed;
}

int product(const product_t *task, i64 threads) {
    int failed = 0;
    for (i64 first = 0; first < task->tokens && !failed; first += MOST_TOKENS) {
        i64 tokens = smaller(MOST_TOKENS, task->tokens - first);
        pass_t pass = {task, first, tokens, 0, task->dtype == BFLOAT16 && amx_available(), NULL};
        pass.room = pass.tiles ? ceil_div(tokens, 16) * 16 : fma_room(tokens);
        i64 padded = ceil_div(task->columns, PACK_COLUMNS) * PACK_COLUMNS;
        pass.x = allocate(pass.room * padded * (pass.tiles ? 2 : 4));
        failed = !pass.x;
        if (!failed) failed = parallel(pack_of_thread, &pass, threads);
        if (!failed) failed = parallel(blocks_of_thread, &pass, threads);
        free(pass.x);
    }
    return failed;
}
