/* I8 and BF16 on tiles: eight registers of 16 rows of 64 bytes, AMX.
 *
 * A panel's 64 inputs (I8; BF16: 32) are one tile as they lie; activations are laid out as tiles too, see linear_ways.h.  Two tiles hold
 * the sums of a block of 16 rows times 2 panels, or four those of two blocks.  BF16 rounds activations to bf16 and adds in the tiles' own
 * order, so it is done here for every number of rows: a token's result then still does not depend on its neighbours.
 */
#include <string.h>

#include "linear_ways.h"
#include "tiles.h"

#ifdef HAS_TILES
enum { TILE_BYTES = 1024, BLOCK_BYTES = 1 << 20, LEAST_BLOCKS = 4 };

typedef struct {
    const linear_t *w;
    const act_t *a;
    room_t room;
    float *y;
    int32_t ldy;
    int32_t panel, last;  /* the first of two; the last of all: where only that is left it is computed again */
    int32_t block;        /* of 16 rows, the first of one or two */
    const char *next;     /* weights to fetch early, */
    int32_t lines;        /* so many lines a step */
} job_t;

static int32_t panel_of(const job_t *job, int32_t p) { return job->panel + p < job->last ? job->panel + p : job->last; }

static const char *weight_of(const job_t *job, int32_t p, int64_t length) {
    return (const char *)job->w->weight + panel_of(job, p) * length;
}

static void fetch(const char **next, int32_t lines) {
    for (int32_t i = 0; i < lines; i++) __builtin_prefetch(*next + i * LINE);
    *next += lines * LINE;
}

/* Sums of one block of rows, the only one or the last, and two panels.  out: [16][32]
 *
 * All lines of both tiles are asked for before the first is loaded.  Asking further ahead is slower, as is reading four panels or one: the
 * processor's own prefetcher runs further ahead the better the fewer streams it has to follow (ADR 30).
 */
static void one_by_two(const job_t *job, int64_t length, int is_bf16, void *out) {
    const uint8_t *x = job->room.data + job->block * length;
    const char *w = weight_of(job, 0, length), *w2 = weight_of(job, 1, length);
    const int64_t step = job->room.block_rows * LINE;
    ZERO(0);
    ZERO(1);
    for (int64_t at = 0; at < length; at += TILE_BYTES, x += step) {
        for (int32_t i = 0; i < TILE_BYTES; i += LINE) __builtin_prefetch(w + at + i);
        for (int32_t i = 0; i < TILE_BYTES; i += LINE) __builtin_prefetch(w2 + at + i);
        LOAD(4, x);
        LOAD(6, w + at);
        LOAD(7, w2 + at);
        if (is_bf16) {
            DOT_PAIRS(0, 4, 6);
            DOT_PAIRS(1, 4, 7);
        } else {
            DOT_BYTES(0, 4, 6);
            DOT_BYTES(1, 4, 7);
        }
    }
    char *to = out;
    STORE(0, to, 128);
    STORE(1, to + 64, 128);
}

/* Sums of two blocks of rows, or one twice, and two panels.  out: [32][32] */
static void two_by_two(const job_t *job, int64_t length, int is_bf16, int is_pair, void *out) {
    const uint8_t *x = job->room.data + job->block * length, *x2 = x + (is_pair ? length : 0);
    const char *w = weight_of(job, 0, length), *w2 = weight_of(job, 1, length), *next = job->next;
    ZERO(0);
    ZERO(1);
    ZERO(2);
    ZERO(3);
    for (int64_t at = 0; at < length; at += TILE_BYTES) {
        fetch(&next, job->lines);
        LOAD(4, x + at);
        LOAD(6, w + at);
        LOAD(7, w2 + at);
        LOAD(5, x2 + at);
        if (is_bf16) {
            DOT_PAIRS(0, 4, 6);
            DOT_PAIRS(1, 4, 7);
            DOT_PAIRS(2, 5, 6);
            DOT_PAIRS(3, 5, 7);
        } else {
            DOT_BYTES(0, 4, 6);
            DOT_BYTES(1, 4, 7);
            DOT_BYTES(2, 5, 6);
            DOT_BYTES(3, 5, 7);
        }
    }
    char *to = out;
    STORE(0, to, 128);
    STORE(1, to + 64, 128);
    STORE(2, to + 16 * 128, 128);
    STORE(3, to + 16 * 128 + 64, 128);
}

/* Put the digits of a row together, times the scales of token and output.  sum: [digits][stride]; value: [16] */
static void scaled(const job_t *job, const int32_t *sum, int32_t stride, int32_t token, int32_t panel, float *value) {
    const float *scale = (const float *)job->w->scale + panel * PANEL;
    const int32_t *start = job->w->start + panel * PANEL;
    int32_t digits = job->room.digits;
    for (int32_t lane = 0; lane < PANEL; lane++) {
        float all = (float)(sum[lane] + start[lane]);
        if (digits == 2) all = all * 256.0f + (float)(sum[stride + lane] + start[lane]);
        value[lane] = all * job->room.scale[token] * scale[lane];
    }
}

/* Write the sums of `blocks` blocks of rows and two panels to y.  sum: [16 blocks][32], int32 or float */
static void finish(const job_t *job, const void *sum, int32_t blocks) {
    int32_t digits = job->room.digits, first = job->block * 16 / digits, until = first + blocks * 16 / digits, stride = 2 * PANEL;
    for (int32_t token = first; token < until && token < job->a->m; token++)
        for (int32_t p = 0; p < 2; p++) {
            int32_t panel = panel_of(job, p), column = panel * PANEL;
            int64_t at = (int64_t)(token - first) * digits * stride + p * PANEL;
            float value[PANEL], *y = job->y + (int64_t)token * job->ldy + column;
            if (job->w->format == BF16) memcpy(value, (const float *)sum + at, sizeof value);
            else scaled(job, (const int32_t *)sum + at, stride, token, panel, value);
            int32_t left = job->w->n - column < PANEL ? job->w->n - column : PANEL;
            for (int32_t lane = 0; job->w->bias && lane < left; lane++) value[lane] += job->w->bias[column + lane];
            if (left == PANEL) memcpy(y, value, sizeof value);
            else memcpy(y, value, (size_t)left * sizeof *value);
        }
}

/* Blocks from..until-1 over all panels; the passes over two panels share the fetching of the next. */
static void blocks_of_rows(job_t *job, int64_t length, int32_t first, int32_t last, int32_t from, int32_t until) {
    _Alignas(64) int32_t sum[32 * 32];
    const int32_t passes = (until - from + 1) / 2, is_bf16 = job->w->format == BF16;
    job->lines = 16 * 2 / passes + 1;
    for (job->panel = first; job->panel < last; job->panel += 2)
        for (job->block = from; job->block < until; job->block += 2) {
            const int64_t steps = length / TILE_BYTES, pass = (job->block - from) / 2;
            const int is_pair = job->block + 1 < until;
            job->next = (const char *)job->w->weight + (job->panel + 2) * length + pass * steps * job->lines * LINE;
            if (until - from == 1) one_by_two(job, length, is_bf16, sum);
            else two_by_two(job, length, is_bf16, is_pair, sum);
            finish(job, sum, 1 + is_pair);
        }
}

void linear_amx(const linear_t *w, const act_t *a, float *y, int32_t ldy, int32_t first, int32_t last) {
    tiles_t config = {.palette = 1};
    job_t job = {.w = w, .a = a, .room = room_of(w, a), .y = y, .ldy = ldy, .last = last - 1};
    for (int t = 0; t < 8; t++) config.row_bytes[t] = LINE, config.rows[t] = t < 5 ? (uint8_t)job.room.block_rows : BLOCK;
    int64_t length = (int64_t)job.room.k * PANEL * (w->format == BF16 ? 2 : 1), most = BLOCK_BYTES / length;
    int32_t blocks = (a->m * job.room.digits + 15) / 16, at_once = (int32_t)(most > LEAST_BLOCKS ? most & ~1 : LEAST_BLOCKS);
    CONFIGURE(&config);
    for (int32_t block = 0; block < blocks; block += at_once)
        blocks_of_rows(&job, length, first, last, block, block + at_once < blocks ? block + at_once : blocks);
    RELEASE();
}

int32_t linear_has_tiles(void) { return 1; }

#else
void linear_amx(const linear_t *w, const act_t *a, float *y, int32_t ldy, int32_t first, int32_t last) {
    linear_portable(w, a, y, ldy, first, last);
}

int32_t linear_has_tiles(void) { return 0; }
#endif
