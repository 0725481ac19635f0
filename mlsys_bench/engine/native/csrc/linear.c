/* Activations in the form kernels want, and who computes what. */
#include "linear.h"

#include <math.h>
#include <string.h>

#include "cpu.h"
#include "linear_ways.h"
#include "pool.h"

static int64_t up(int64_t size, int64_t step) { return (size + step - 1) / step * step; }

static int is_float(const linear_t *w) { return w->format == F32 || w->format == BF16; }

int32_t linear_padded_k(int32_t format, int32_t group, int32_t k) {
    return format == F32 ? k : (int32_t)up(k, format == BF16 ? 32 : group > 64 ? group : 64);
}

/* The kernels read a lone row of floats where it is. */
static int is_direct(const linear_t *w, int32_t m) { return is_float(w) && m == 1 && linear_padded_k(w->format, 0, w->k) == w->k; }

static room_t layout(const linear_t *w, int32_t m, void *room, int64_t *bytes) {
    room_t r = {.digits = is_float(w) || w->int8_input ? 1 : 2, .k = linear_padded_k(w->format, w->group, w->k)};
    r.groups = w->format == I4 ? r.k / w->group : 0;
    r.tiles = (int32_t)up((int64_t)m * r.digits, TILE) / TILE;
    int64_t scale = up(4LL * m, 64), sums = up(4LL * m * r.digits * r.groups, 64);
    r.scale = room;
    r.sums = (int32_t *)((char *)room + scale);
    r.data = (uint8_t *)room + scale + sums;
    *bytes = scale + sums + (int64_t)m * r.digits * r.k * (is_float(w) ? 4 : 1);
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

/* Copy inputs first..last-1 of a token into its column of the tile. */
static void place_floats(const linear_t *w, const act_t *a, const room_t *r, int32_t token, int32_t tile, int32_t first, int32_t last) {
    int32_t start = first_token(a->m, tile, r->tiles), rows = first_token(a->m, tile + 1, r->tiles) - start;
    const float *x = a->x + (int64_t)token * a->ldx;
    float *column = (float *)r->data + (int64_t)start * r->k + (token - start);
    for (int32_t i = first; i < last; i++) column[(int64_t)i * rows] = i < w->k ? x[i] : 0.0f;
}

static void quantise_token(const linear_t *w, const act_t *a, const room_t *r, int32_t token, int32_t tile, int32_t first, int32_t last) {
    row_t row = row_of(w, a, r, token, tile);
    (cpu_level() >= AVX512 ? quantise_avx512 : quantise_portable)(w, r, &row, first, last);
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
    for (int32_t tile = first_tile; tile < last_tile; tile++)
        for (int32_t token = first_token(a->m, tile, r.tiles); token < first_token(a->m, tile + 1, r.tiles); token++)
            (is_float(w) ? place_floats : quantise_token)(w, a, &r, token, tile, first, last);
}

static linear_way way(void) {
    switch (cpu_level()) {
        case AVX2: return linear_avx2;
        case AVX512: case AMX: return linear_avx512;
        default: return linear_portable;
    }
}

void linear_share(const linear_t *w, const act_t *a, float *y, int32_t ldy, int32_t ith, int32_t nth) {
    int32_t panels = (w->n + PANEL - 1) / PANEL;
    way()(w, a, y, ldy, first_token(panels, ith, nth), first_token(panels, ith + 1, nth));
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
