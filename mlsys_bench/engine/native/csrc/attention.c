/* See attention.h. */
#include "attention.h"

#define TILE 64            /* keys of a softmax of its own */
#define PART (8 * TILE)    /* keys that one thread takes where contexts are shared */
#define ROWS 64            /* queries times heads of a group that see a tile together */
#define SHARED_ROWS 16384  /* room for parts of contexts, in rows of a head */
#ifdef __AVX512F__
enum { HIGH = 8, WIDE = 2 }; /* a block of sums that stays in registers */
#else
enum { HIGH = 4, WIDE = 1 };
#endif

/* A softmax over some keys: largest score, sum of exp(score - largest), and the values weighted with these, not yet divided. */
typedef struct {
    float *largest, *sum, *values; /* [rows], [rows], [rows][dp] */
} state_t;

/* The memory of a thread. */
typedef struct {
    float *q, *k, *v, *p; /* [rows][head_dim], [head_dim][TILE], [TILE][dp], [rows][TILE] */
    float *scales; /* INT8: of the keys and of the values of a tile, [2][TILE] */
    state_t tile, part, all;
    int32_t position[ROWS]; /* of the rows of the task */
} room_t;

/* Rows row0 .. row0 + rows - 1 of a sequence and a KV head; row r is query r / group and head r % group of the group. */
typedef struct {
    int32_t sequence, head, row0, rows, part; /* part -1: all */
    int64_t record;
} task_t;

static int32_t padded(int32_t n) { return (n + LANES - 1) / LANES * LANES; }
static int32_t least(int32_t a, int32_t b) { return a < b ? a : b; }
static int32_t most(int32_t a, int32_t b) { return a > b ? a : b; }
static int32_t parts_of(int32_t n, int32_t size) { return (n + size - 1) / size; }

/* Widen the keys at..at+n-1 of a block to columns of k: [head_dim][TILE]; n is 16 at most, and a block may be shorter. */
INLINE void load_keys(int32_t format, const uint8_t *head, int32_t bt, int32_t d, int32_t at, int32_t n, float *k) {
    if (at + LANES <= bt) {
        for (int32_t i = 0; i < d; i++)
            store(k + i * TILE, load_as(format, head, (int64_t)i * bt + at));
        return;
    }
    for (int32_t i = 0; i < d; i++)
        for (int32_t j = 0; j < n; j++)
            k[i * TILE + j] = load_one(format, head, (int64_t)i * bt + at + j);
}

/* Widen values to rows of v: [TILE][dp]. */
INLINE void load_values(int32_t format, const uint8_t *head, int32_t bt, int32_t d, int32_t at, int32_t n, float *v) {
    const int32_t dp = padded(d);
    for (int32_t j = 0; j < n; j++) {
        const int64_t from = (int64_t)d * bt + (int64_t)(at + j) * d;
        int32_t i = 0;
        for (; i + LANES <= d; i += LANES)
            store(v + j * dp + i, load_as(format, head, from + i));
        for (; i < d; i++)
            v[j * dp + i] = load_one(format, head, from + i);
    }
}

/* ---------------------------------------------------------------- products */

/* c = a b, or c += a b unless `fresh`; a: [rows][lda], b: [k][ldb] from element b0 on.  Each sum runs in order of k, wherever that is cut,
 * so that no row depends on which others are computed with it. */
INLINE void product_block(int rows, int vectors, int fresh, int32_t format, int32_t k, const float *a, int32_t lda, const uint8_t *b,
                          int64_t b0, int32_t ldb, float *c, int32_t ldc) {
    floats sum[HIGH][WIDE];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++)
            sum[r][v] = fresh ? each(0) : load(c + r * ldc + v * LANES);
    for (int32_t i = 0; i < k; i++) {
        floats right[WIDE];
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++)
            right[v] = load_as(format, b, b0 + (int64_t)i * ldb + v * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            const floats left = each(a[r * lda + i]);
#pragma GCC unroll 2
            for (int v = 0; v < vectors; v++)
                sum[r][v] += left * right[v];
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++)
            store(c + r * ldc + v * LANES, sum[r][v]);
}

/* The same for any number of rows and n columns, a multiple of 16. */
INLINE void product(int32_t format, int fresh, int32_t rows, int32_t n, int32_t k, const float *a, int32_t lda, const uint8_t *b,
                    int64_t b0, int32_t ldb, float *c, int32_t ldc) {
    int32_t j = 0;
    for (; j + WIDE * LANES <= n; j += WIDE * LANES) {
        int32_t r = 0;
        for (; r + HIGH <= rows; r += HIGH)
            product_block(HIGH, WIDE, fresh, format, k, a + r * lda, lda, b, b0 + j, ldb, c + r * ldc + j, ldc);
        for (; r + 2 <= rows; r += 2)
            product_block(2, WIDE, fresh, format, k, a + r * lda, lda, b, b0 + j, ldb, c + r * ldc + j, ldc);
        for (; r < rows; r++)
            product_block(1, WIDE, fresh, format, k, a + r * lda, lda, b, b0 + j, ldb, c + r * ldc + j, ldc);
    }
    for (; j < n; j += LANES) {
        int32_t r = 0;
        for (; r + HIGH <= rows; r += HIGH)
            product_block(HIGH, 1, fresh, format, k, a + r * lda, lda, b, b0 + j, ldb, c + r * ldc + j, ldc);
        for (; r < rows; r++)
            product_block(1, 1, fresh, format, k, a + r * lda, lda, b, b0 + j, ldb, c + r * ldc + j, ldc);
    }
}

static void wide_product(int32_t rows, int32_t n, int32_t k, const float *a, int32_t lda, const float *b, int32_t ldb, float *c,
                         int32_t ldc) {
    product(KV_F32, 1, rows, n, k, a, lda, (const uint8_t *)b, 0, ldb, c, ldc);
}

/* ---------------------------------------------------------------- softmax */

/* Add the keys of `from` to those of `into`.  The arrays of largest scores and sums are padded to whole vectors. */
static void merge(state_t *into, const state_t *from, int32_t rows, int32_t dp) {
    float before[ROWS], after[ROWS];
    for (int32_t r = 0; r < rows; r += LANES) {
        const floats a = load(into->largest + r), b = load(from->largest + r), top = larger(a, b);
        store(before + r, exp_of(a - top));
        store(after + r, exp_of(b - top));
    }
    for (int32_t r = 0; r < rows; r++) {
        if (from->largest[r] == -INFINITY)
            continue;
        into->largest[r] = from->largest[r] > into->largest[r] ? from->largest[r] : into->largest[r];
        into->sum[r] = into->sum[r] * before[r] + from->sum[r] * after[r];
        for (int32_t i = 0; i < dp; i += LANES) {
            const floats sum = load(into->values + r * dp + i) * before[r];
            store(into->values + r * dp + i, sum + load(from->values + r * dp + i) * after[r]);
        }
    }
}

/* Return the scores, those of keys outside first..last-1 as -inf; v is the number of the vector in its tile. */
INLINE floats seen(floats scores, int v, int32_t first, int32_t last) {
    const ints lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, key = lane + v * LANES;
    return pick((key >= first) & (key < last), scores, each(-INFINITY));
}

/* Turn the scores of one row into weights; of its keys first..last-1 are seen, none where first >= last.
 * scales: NULL, or what the scores and then the weights are yet to be multiplied with. */
static void soften(float *p, int32_t first, int32_t last, const float *scales, float softcap, float *largest, float *sum) {
    enum { N = TILE / LANES };
    floats s[N], top = each(-INFINITY), total = each(0);
    for (int v = 0; v < N; v++)
        s[v] = scales ? load(p + v * LANES) * load(scales + v * LANES) : load(p + v * LANES);
    for (int v = 0; v < N && softcap > 0; v++)
        s[v] = softcap - 2 * softcap / (exp_of(s[v] * (2 / softcap)) + 1); /* c tanh(s / c) */
    for (int v = 0; v < N && (first > 0 || last < TILE); v++)
        s[v] = seen(s[v], v, first, last);
    for (int v = 0; v < N; v++)
        top = larger(s[v], top);
    *largest = largest_of(top);
    const floats from = each(*largest == -INFINITY ? 0 : *largest); /* a row that sees nothing: every weight is 0 */
    for (int v = 0; v < N; v++) {
        s[v] = exp_of(s[v] - from);
        store(p + v * LANES, scales ? s[v] * load(scales + TILE + v * LANES) : s[v]);
        total += s[v];
    }
    *sum = sum_of(total);
}

/* ---------------------------------------------------------------- a task */

static int32_t keys_of(const attend_t *a, int32_t sequence) { return a->position[a->first[sequence + 1] - 1] + 1; }

/* The query of a row, as a place in the step. */
static int32_t query_of(const attend_t *a, const cache_t *c, const task_t *t, int32_t row) {
    return a->first[t->sequence] + (t->row0 + row) / (a->heads / c->kv_heads);
}

static int32_t head_of_row(const attend_t *a, const cache_t *c, const task_t *t, int32_t row) {
    const int32_t group = a->heads / c->kv_heads;
    return t->head * group + (t->row0 + row) % group;
}

static void load_queries(const attend_t *a, const cache_t *c, const task_t *t, room_t *r) {
    const int32_t d = c->head_dim;
    for (int32_t row = 0; row < t->rows; row++) {
        const int32_t query = query_of(a, c, t, row);
        const float *from = a->q + (int64_t)query * a->ldq + head_of_row(a, c, t, row) * d;
        r->position[row] = a->position[query];
        for (int32_t i = 0; i < d; i++)
            r->q[row * d + i] = from[i] * a->scale;
    }
}

/* Keys key0..key0+keys-1 of a sequence and a KV head. */
typedef struct {
    const cache_t *c;
    const int32_t *table;
    int32_t layer, head, key0, keys;
} tile_t;

/* The next run of keys from j on that lie in one block: at most 16, which begin at *at in *head. */
INLINE int32_t run_of(const tile_t *t, int32_t j, uint8_t **head, int32_t *at) {
    const int32_t bt = t->c->block_tokens, key = t->key0 + j;
    *at = key % bt;
    *head = head_of(t->c, t->layer, t->table[key / bt], t->head);
    return least(least(LANES, bt - *at), t->keys - j);
}

static void load_scales(const tile_t *t, float *scales) {
    uint8_t *head;
    for (int32_t j = 0, n, at; j < t->keys; j += n) {
        n = run_of(t, j, &head, &at);
        memcpy(scales + j, scales_of(t->c, head) + at, n * sizeof(float));
        memcpy(scales + TILE + j, scales_of(t->c, head) + t->c->block_tokens + at, n * sizeof(float));
    }
}

/* Scores of few rows, keys widened as they are read; then values weighted with p from key `from` on.  Blocks of 16 tokens or a multiple. */
INLINE void scores_in_place(int32_t format, const tile_t *t, int32_t rows, room_t *r) {
    uint8_t *head;
    for (int32_t j = 0, at; j < t->keys; j += LANES) {
        run_of(t, j, &head, &at);
        product(format, 1, rows, LANES, t->c->head_dim, r->q, t->c->head_dim, head, at, t->c->block_tokens, r->p + j, TILE);
    }
}

INLINE void values_in_place(int32_t format, const tile_t *t, int32_t rows, int32_t from, room_t *r, state_t *to) {
    const int32_t d = t->c->head_dim, bt = t->c->block_tokens;
    uint8_t *head;
    for (int32_t j = from / LANES * LANES, at; j < t->keys; j += LANES) {
        const int32_t n = run_of(t, j, &head, &at);
        if (j <= from)
            product(format, 1, rows, d, n, r->p + j, TILE, head, (int64_t)d * bt + (int64_t)at * d, d, to->values, d);
        else
            product(format, 0, rows, d, n, r->p + j, TILE, head, (int64_t)d * bt + (int64_t)at * d, d, to->values, d);
    }
}

/* The same for many rows, which share a widened tile. */
INLINE void scores_of_tile(int32_t format, const tile_t *t, int32_t rows, room_t *r) {
    const int32_t d = t->c->head_dim, bt = t->c->block_tokens;
    uint8_t *head;
    for (int32_t j = 0, n, at; j < t->keys; j += n) {
        n = run_of(t, j, &head, &at);
        load_keys(format, head, bt, d, at, n, r->k + j);
        load_values(format, head, bt, d, at, n, r->v + j * padded(d));
    }
    wide_product(rows, padded(t->keys), d, r->q, d, r->k, TILE, r->p, TILE);
}

static void scores(const tile_t *t, int32_t rows, int in_place, room_t *r) {
    switch (t->c->format * 2 + in_place) {
    case KV_F32 * 2: scores_of_tile(KV_F32, t, rows, r); break;
    case KV_BF16 * 2: scores_of_tile(KV_BF16, t, rows, r); break;
    case KV_INT8 * 2: scores_of_tile(KV_INT8, t, rows, r); break;
    case KV_F32 * 2 + 1: scores_in_place(KV_F32, t, rows, r); break;
    case KV_BF16 * 2 + 1: scores_in_place(KV_BF16, t, rows, r); break;
    default: scores_in_place(KV_INT8, t, rows, r);
    }
}

static void values(const tile_t *t, int32_t rows, int in_place, int32_t from, room_t *r, state_t *to) {
    const int32_t dp = padded(t->c->head_dim);
    if (!in_place)
        wide_product(rows, dp, t->keys - from, r->p + from, TILE, r->v + from * dp, dp, to->values, dp);
    else if (t->c->format == KV_F32)
        values_in_place(KV_F32, t, rows, from, r, to);
    else if (t->c->format == KV_BF16)
        values_in_place(KV_BF16, t, rows, from, r, to);
    else
        values_in_place(KV_INT8, t, rows, from, r, to);
}

/* Attend to the tile from key0 on. */
static void attend_tile(const attend_t *a, const cache_t *c, int32_t layer, const task_t *t, int32_t key0, room_t *r, state_t *to) {
    const int in_place = t->rows <= HIGH && c->block_tokens % LANES == 0 && c->head_dim % LANES == 0;
    const tile_t tile = {
        .c = c, .table = a->block_table + (int64_t)t->sequence * a->width, .layer = layer, .head = t->head, .key0 = key0,
        .keys = least(TILE, r->position[t->rows - 1] + 1 - key0),
    };
    int32_t from = tile.keys - 1;
    scores(&tile, t->rows, in_place, r);
    if (c->format == KV_INT8)
        load_scales(&tile, r->scales);
    for (int32_t row = 0; row < t->rows; row++) {
        const int32_t at = r->position[row], last = least(TILE, at + 1 - key0);
        const int32_t first = a->window ? most(0, at - a->window + 1 - key0) : 0;
        from = least(from, first);
        soften(r->p + row * TILE, first, last, c->format == KV_INT8 ? r->scales : NULL, a->softcap, to->largest + row, to->sum + row);
    }
    values(&tile, t->rows, in_place, from, r, to);
}

/* The first position that any row of a task sees. */
static int32_t lowest(const attend_t *a, const cache_t *c, const task_t *t) {
    return a->window ? most(0, a->position[query_of(a, c, t, 0)] - a->window + 1) : 0;
}

/* Attend to one part, which the task sees some of. */
static void attend_part(const attend_t *a, const cache_t *c, int32_t layer, const task_t *t, int32_t part, room_t *r, state_t *to) {
    const int32_t first = most(part * PART, lowest(a, c, t) / TILE * TILE);
    const int32_t end = least((part + 1) * PART, r->position[t->rows - 1] + 1);
    for (int32_t key0 = first; key0 < end; key0 += TILE) {
        attend_tile(a, c, layer, t, key0, r, key0 == first ? to : &r->tile);
        if (key0 != first)
            merge(to, &r->tile, t->rows, padded(c->head_dim));
    }
}

/* Divide by the sum and hand out. */
static void finish(const attend_t *a, const cache_t *c, const task_t *t, const state_t *s) {
    const int32_t d = c->head_dim, dp = padded(d);
    for (int32_t r = 0; r < t->rows; r++) {
        float *to = a->out + (int64_t)query_of(a, c, t, r) * a->ldo + head_of_row(a, c, t, r) * d;
        const float share = 1 / s->sum[r];
        for (int32_t i = 0; i < d; i++)
            to[i] = s->values[r * dp + i] * share;
    }
}

/* ---------------------------------------------------------------- who does what */

static float *take(float **from, int64_t floats) {
    float *taken = *from;
    *from += floats;
    return taken;
}

static state_t state_at(float **from, int32_t dp) {
    return (state_t){.largest = take(from, ROWS), .sum = take(from, ROWS), .values = take(from, ROWS * dp)};
}

static room_t room_at(float *own, int32_t d) {
    const int32_t dp = padded(d);
    room_t r = {.q = take(&own, ROWS * dp), .k = take(&own, d * TILE), .v = take(&own, TILE * dp), .p = take(&own, ROWS * TILE)};
    r.scales = take(&own, 2 * TILE);
    r.tile = state_at(&own, dp), r.part = state_at(&own, dp), r.all = state_at(&own, dp);
    return r;
}

int64_t attention_floats(int32_t d) {
    const int64_t dp = padded(d);
    return ROWS * dp + (int64_t)d * TILE + TILE * dp + (ROWS + 2) * TILE + 3 * (2 * ROWS + ROWS * dp);
}

int64_t attention_shared_floats(int32_t threads, int32_t d) { return threads > 1 ? (int64_t)SHARED_ROWS * (padded(d) + 2) : 0; }

static int32_t rows_of(const attend_t *a, const cache_t *c, int32_t s) {
    return (a->first[s + 1] - a->first[s]) * (a->heads / c->kv_heads);
}

int attention_is_split(const attend_t *a, const cache_t *c, int32_t threads) {
    int64_t records = 0;
    if ((int64_t)a->sequences * c->kv_heads >= 2 * threads || threads < 2)
        return 0;
    for (int32_t s = 0; s < a->sequences; s++) {
        if (rows_of(a, c, s) > ROWS)
            return 0;
        records += (int64_t)c->kv_heads * parts_of(keys_of(a, s), PART);
    }
    return records > (int64_t)a->sequences * c->kv_heads && records * ROWS <= SHARED_ROWS;
}

/* The record of a task's part. */
static state_t record_at(const task_t *t, float *shared, int32_t dp) {
    float *at = shared + t->record * ROWS * (dp + 2);
    return state_at(&at, dp);
}

/* Set *t to the task of this number and return 1, or 0 when there are no more.  *before and t->sequence walk on from call to call. */
static int find(const attend_t *a, const cache_t *c, int split, int64_t number, int64_t *before, task_t *t) {
    for (; t->sequence < a->sequences; t->sequence++) {
        const int32_t all = rows_of(a, c, t->sequence), blocks = parts_of(all, ROWS);
        const int32_t parts = split ? parts_of(keys_of(a, t->sequence), PART) : 1;
        const int64_t left = number - *before;
        if (left < (int64_t)blocks * parts * c->kv_heads) {
            t->head = left % c->kv_heads;
            t->part = split ? left / c->kv_heads % parts : -1;
            t->row0 = left / c->kv_heads / parts * ROWS;
            t->rows = least(ROWS, all - t->row0);
            t->record = number;
            return 1;
        }
        *before += (int64_t)blocks * parts * c->kv_heads;
    }
    return 0;
}

/* All that a task's rows see. */
static void attend_whole(const attend_t *a, const cache_t *c, int32_t layer, const task_t *t, room_t *r) {
    const int32_t first = lowest(a, c, t) / PART, last = r->position[t->rows - 1] / PART;
    for (int32_t part = first; part <= last; part++) {
        attend_part(a, c, layer, t, part, r, part == first ? &r->all : &r->part);
        if (part != first)
            merge(&r->all, &r->part, t->rows, padded(c->head_dim));
    }
    finish(a, c, t, &r->all);
}

void attend(const attend_t *a, const cache_t *c, int32_t layer, int split, int32_t *next, float *own, float *shared) {
    room_t r = room_at(own, c->head_dim);
    task_t t = {0};
    int64_t before = 0;
    while (find(a, c, split, __atomic_fetch_add(next, 1, __ATOMIC_RELAXED), &before, &t)) {
        load_queries(a, c, &t, &r);
        if (!split) {
            attend_whole(a, c, layer, &t, &r);
            continue;
        }
        state_t mine = record_at(&t, shared, padded(c->head_dim));
        if (t.part >= lowest(a, c, &t) / PART)
            attend_part(a, c, layer, &t, t.part, &r, &mine);
    }
}

int attention_is_by_head(const attend_t *a, const cache_t *c) { return a->tokens == 1 && rows_of(a, c, 0) <= ROWS; }

void attend_head(const attend_t *a, const cache_t *c, int32_t layer, int32_t head, float *own) {
    room_t r = room_at(own, c->head_dim);
    const task_t t = {.head = head, .rows = rows_of(a, c, 0), .part = -1};
    load_queries(a, c, &t, &r);
    attend_whole(a, c, layer, &t, &r);
}

void attend_merge(const attend_t *a, const cache_t *c, float *shared, int32_t ith, int32_t nth) {
    const int32_t dp = padded(c->head_dim);
    task_t t = {0};
    int64_t before = 0;
    for (int64_t number = 0; find(a, c, 1, number, &before, &t); number++) {
        if (t.part != lowest(a, c, &t) / PART || (t.sequence * c->kv_heads + t.head) % nth != ith)
            continue;
        state_t all = record_at(&t, shared, dp);
        const int32_t parts = parts_of(keys_of(a, t.sequence), PART);
        for (task_t other = t; ++other.part < parts;) {
            other.record += c->kv_heads;
            const state_t from = record_at(&other, shared, dp);
            merge(&all, &from, t.rows, dp);
        }
        finish(a, c, &t, &all);
    }
}
