/* Activations in the form kernels want, and who computes what. */
#include "linear.h"

#include <string.h>

#include "cpu.h"
#include "linear_ways.h"
#include "pool.h"

static int64_t up(int64_t size, int64_t step) { return (size + step - 1) / step * step; }

static int is_float(const linear_t *w) { return w->format == F32 || w->format == BF16; }

int32_t linear_padded_k(int32_t format, int32_t group, int32_t k) {
    return format == F32 ? k : (int32_t)up(k, format == BF16 ? 32 : group > 64 ? group : 64);
}

/* Whether AMX computes it: integers give the same anywhere, and few rows need no tiles; bf16 adds in another order there, so always. */
static int is_blocked(const linear_t *w, int32_t m) {
    if (cpu_level() != AMX) return 0;
    if (w->format == I4) return m * (w->int8_input ? 1 : 2) >= (w->group < 128 ? 32 : 16); /* each group leaves the tiles by itself */
    return w->format == BF16 || (w->format == I8 && m >= 4);
}

/* Whether it is computed from pairs of bf16: in their own order too, so always where it ever is. */
static int is_paired(const linear_t *w) { return cpu_level() == AVX512_BF16 && w->format == BF16; }

/* The kernels read a lone row of floats where it is. */
static int is_direct(const linear_t *w, int32_t m) {
    return is_float(w) && m == 1 && linear_padded_k(w->format, 0, w->k) == w->k && !is_blocked(w, m) && !is_paired(w);
}

static room_t layout(const linear_t *w, int32_t m, void *room, int64_t *bytes) {
    room_t r = {.digits = is_float(w) || w->int8_input ? 1 : 2, .k = linear_padded_k(w->format, w->group, w->k)};
    r.is_blocked = is_blocked(w, m);
    r.is_paired = is_paired(w);
    r.groups = w->format == I4 ? r.k / w->group : 0;
    int32_t all = m * r.digits;
    r.block_rows = all < BLOCK ? all : BLOCK;
    r.tiles = all > TILE && all < TILE + 3 ? 3 : (int32_t)up(all, TILE) / TILE; /* not 6 and 7 rows: kernels take 4 panels up to 6, else 2 */
    int64_t scale = up(4LL * m, 64), sums = up(4LL * m * r.digits * r.groups, 64);
    r.scale = room;
    r.sums = (int32_t *)((char *)room + scale);
    r.data = (uint8_t *)room + scale + sums;
    int64_t rows = r.is_blocked ? up(all, r.block_rows) : all;
    *bytes = scale + sums + rows * r.k * (!is_float(w) ? 1 : r.is_blocked || r.is_paired ? 2 : 4);
    return r;
}

room_t room_of(const linear_t *w, const act_t *a) {
    int64_t bytes;
    room_t r = layout(w, a->m, a->room, &bytes);
    if (is_direct(w, a->m)) r.data = (uint8_t *)(uintptr_t)a->x;
    return r;
}

int64_t act_bytes(const linear_t *w, int32_t m) {
    static char nowhere[64];
    int64_t bytes;
    layout(w, m, nowhere, &bytes);
    return up(bytes, 64);
}

/* Copy inputs first..last-1 of a tile's tokens side by side, written as one stream. */
static void place_floats(const linear_t *w, const act_t *a, const room_t *r, int32_t tile, int32_t first, int32_t last) {
    int32_t start = first_token(a->m, tile, r->tiles), rows = first_token(a->m, tile + 1, r->tiles) - start;
    const float *x = a->x + (int64_t)start * a->ldx;
    float *to = (float *)r->data + (int64_t)start * r->k + (int64_t)first * rows;
    for (int32_t k = first; k < last; k++)
        for (int32_t row = 0; row < rows; row++) *to++ = k < w->k ? x[(int64_t)row * a->ldx + k] : 0.0f;
}

/* Fill inputs first..last-1 of a tile. */
static void place_tile(const linear_t *w, const act_t *a, const room_t *r, int32_t tile, int32_t first, int32_t last) {
    if (is_float(w) && !r->is_blocked && !r->is_paired) return place_floats(w, a, r, tile, first, last);
    const int32_t start = first_token(a->m, tile, r->tiles), end = first_token(a->m, tile + 1, r->tiles);
    for (int32_t token = start; token < end; token++) {
        if (is_float(w)) {
            const row_t row = {.x = a->x + (int64_t)token * a->ldx, .before = start, .rows = end - start, .row = token - start};
            (cpu_vector() == AVX512 ? pair_avx512 : pair_portable)(w, r, &row, first, last);
            continue;
        }
        row_t row = row_of(w, a, r, token, tile);
        (cpu_vector() == AVX512 ? quantise_avx512 : quantise_portable)(w, r, &row, first, last);
    }
}

/* Many tiles are shared out whole; of few, every thread takes some of the inputs, so that no two write to one cache line. */
void quantise_share(const linear_t *w, const act_t *a, int32_t ith, int32_t nth) {
    if (is_direct(w, a->m)) return;
    room_t r = room_of(w, a);
    int by_tiles = r.tiles >= 2 * nth;
    int32_t chunks = (r.k + CHUNK - 1) / CHUNK;
    int32_t first_tile = by_tiles ? first_token(r.tiles, ith, nth) : 0, last_tile = by_tiles ? first_token(r.tiles, ith + 1, nth) : r.tiles;
    int32_t first = by_tiles ? 0 : first_token(chunks, ith, nth) * CHUNK;
    int32_t last = by_tiles ? chunks * CHUNK : first_token(chunks, ith + 1, nth) * CHUNK;
    last = last < r.k ? last : r.k;
    for (int32_t tile = first_tile; tile < last_tile; tile++) place_tile(w, a, &r, tile, first, last);
}

static linear_way way(const linear_t *w, int32_t m) {
    if (is_blocked(w, m)) return w->format == I4 ? linear_amx_nibbles : linear_amx;
    switch (cpu_vector()) {
        case AVX2: return linear_avx2;
        case AVX512: return linear_avx512;
        default: return linear_portable;
    }
}

void linear_panels(const linear_t *w, const act_t *a, float *y, int32_t ldy, int32_t first, int32_t last) {
    if (first < last) way(w, a->m)(w, a, y, ldy, first, last);
}

void linear_share(const linear_t *w, const act_t *a, float *y, int32_t ldy, int32_t ith, int32_t nth) {
    int32_t panels = (w->n + PANEL - 1) / PANEL;
    linear_panels(w, a, y, ldy, first_token(panels, ith, nth), first_token(panels, ith + 1, nth));
}

typedef struct {
    const linear_t *w;
    const act_t *a;
    float *y;
    int32_t ldy;
} run_t;

static void run_share(void *arg, int32_t ith, int32_t nth) {
    const run_t *run = arg;
    quantise_share(run->w, run->a, ith, nth);
    pool_barrier();
    linear_share(run->w, run->a, run->y, run->ldy, ith, nth);
}

void linear_run(const linear_t *w, const act_t *a, float *y, int32_t ldy, int32_t threads) {
    run_t run = {w, a, y, ldy};
    pool_run(threads, run_share, &run);
}
