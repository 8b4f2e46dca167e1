/* AMX tiles in plain C, for kernels/cpu_amx.h on processors that have none. */
#include <stdint.h>
#include <string.h>

static __thread uint8_t emulated_tiles[8][16][64];
static __thread int emulated_ready;
__attribute__((weak, visibility("default"))) int emulated_products;

static inline void emulated_configure(const uint8_t *config) {
    emulated_ready = config[0] == 1;
    for (int t = 0; t < 8; t++) emulated_ready &= config[16 + 2 * t] == 64 && config[48 + t] == 16;
    memset(emulated_tiles, 255, sizeof emulated_tiles);
}

static inline void emulated_load(int tile, const void *at, long stride) {
    if (!emulated_ready) __builtin_trap();
    for (int r = 0; r < 16; r++) memcpy(emulated_tiles[tile][r], (const uint8_t *)at + r * stride, 64);
}

static inline void emulated_store(int tile, void *at, long stride) {
    if (!emulated_ready) __builtin_trap();
    for (int r = 0; r < 16; r++) memcpy((uint8_t *)at + r * stride, emulated_tiles[tile][r], 64);
}

static inline float emulated_bf16(const uint8_t *at) {
    uint32_t bits = 0;
    memcpy((uint8_t *)&bits + 2, at, 2);
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* to[m][n] += left[m][2 k] * right[k][2 n] + left[m][2 k + 1] * right[k][2 n + 1] */
static inline void emulated_multiply(int to, int left, int right) {
    if (!emulated_ready) __builtin_trap();
    emulated_products++;
    float(*sums)[16] = (float(*)[16])emulated_tiles[to];
    for (int m = 0; m < 16; m++)
        for (int n = 0; n < 16; n++)
            for (int k = 0; k < 32; k++)
                sums[m][n] += emulated_bf16(&emulated_tiles[left][m][2 * k]) *
                              emulated_bf16(&emulated_tiles[right][k / 2][4 * n + k % 2 * 2]);
}

#define TILE_CONFIGURE(at) emulated_configure(at)
#define TILE_RELEASE() (void)(emulated_ready = 0)
#define TILE_LOAD(tile, at, stride) emulated_load(tile, at, stride)
#define TILE_STORE(tile, at, stride) emulated_store(tile, at, stride)
#define TILE_MULTIPLY(to, left, right) emulated_multiply(to, left, right)
