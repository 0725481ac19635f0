/* AMX: eight registers, tiles, of up to 16 rows of 64 bytes, and products of them.
 *
 * Compiled with MLSYS_EMULATE_TILES, the instructions are plain C functions, so that any machine can test all but their speed.
 */
#ifndef MLSYS_TILES_H
#define MLSYS_TILES_H

#include <stdint.h>
#include <string.h>

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} tiles_t; /* as ldtilecfg reads it */

#if defined(MLSYS_EMULATE_TILES)
static _Thread_local uint8_t tiles[8][16][64];
static _Thread_local tiles_t tile_shapes;

static inline void emulate_load(int t, const void *from, int64_t stride) {
    for (int row = 0; row < tile_shapes.rows[t]; row++) memcpy(tiles[t][row], (const char *)from + row * stride, tile_shapes.row_bytes[t]);
}

static inline void emulate_store(int t, void *to, int64_t stride) {
    for (int row = 0; row < tile_shapes.rows[t]; row++) memcpy((char *)to + row * stride, tiles[t][row], tile_shapes.row_bytes[t]);
}

static inline void emulate_bytes(int c, int a, int b, int is_signed) {
    for (int row = 0; row < tile_shapes.rows[c]; row++)
        for (int column = 0; column < 16; column++) {
            int32_t sum;
            memcpy(&sum, tiles[c][row] + 4 * column, 4);
            for (int k = 0; k < tile_shapes.row_bytes[a]; k++) {
                const int32_t left = is_signed ? (int8_t)tiles[a][row][k] : tiles[a][row][k];
                sum = (int32_t)((uint32_t)sum + (uint32_t)(left * (int8_t)tiles[b][k / 4][4 * column + k % 4]));
            }
            memcpy(tiles[c][row] + 4 * column, &sum, 4);
        }
}

static inline float emulate_bf16(const uint8_t *at) {
    uint8_t bytes[4] = {0, 0, at[0], at[1]};
    float value;
    memcpy(&value, bytes, 4);
    return value;
}

static inline void emulate_pairs(int c, int a, int b) {
    for (int row = 0; row < tile_shapes.rows[c]; row++)
        for (int column = 0; column < 16; column++) {
            float sum;
            memcpy(&sum, tiles[c][row] + 4 * column, 4);
            for (int k = 0; k < 32; k++)
                sum += emulate_bf16(tiles[a][row] + 2 * k) * emulate_bf16(tiles[b][k / 2] + 4 * column + 2 * (k % 2));
            memcpy(tiles[c][row] + 4 * column, &sum, 4);
        }
}

#define HAS_TILES 1
#define CONFIGURE(config) (tile_shapes = *(config))
#define RELEASE() ((void)0)
#define ZERO(t) memset(tiles[t], 0, sizeof tiles[t])
#define LOAD(t, from) emulate_load(t, from, 64)
#define STORE(t, to, stride) emulate_store(t, to, stride)
#define DOT_BYTES(c, a, b) emulate_bytes(c, a, b, 0)
#define DOT_SIGNED(c, a, b) emulate_bytes(c, a, b, 1)
#define DOT_PAIRS(c, a, b) emulate_pairs(c, a, b)
#elif !defined(MLSYS_OLD_ASSEMBLER) && defined(__x86_64__) && (__GNUC__ >= 11 || __clang_major__ >= 12)
/* Spelled out with the memory they touch: gcc 12's own intrinsics forget it, and stores of the configuration then come after its use. */
#define HAS_TILES 1
#define CONFIGURE(config) __asm__ volatile("ldtilecfg %0" ::"m"(*(config)) : "memory")
#define RELEASE() __asm__ volatile("tilerelease" ::: "memory")
#define ZERO(t) __asm__ volatile("tilezero %%tmm" #t ::: "memory")
#define LOAD(t, from) __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #t ::"r"(from), "r"((int64_t)64) : "memory")
#define STORE(t, to, stride) __asm__ volatile("tilestored %%tmm" #t ", (%0,%1,1)" ::"r"(to), "r"((int64_t)(stride)) : "memory")
#define DOT_BYTES(c, a, b) __asm__ volatile("tdpbusd %%tmm" #b ", %%tmm" #a ", %%tmm" #c ::: "memory")
#define DOT_SIGNED(c, a, b) __asm__ volatile("tdpbssd %%tmm" #b ", %%tmm" #a ", %%tmm" #c ::: "memory")
#define DOT_PAIRS(c, a, b) __asm__ volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #c ::: "memory")
#endif

#endif
