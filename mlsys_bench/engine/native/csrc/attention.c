/* See attention.h. */
#include "attention.h"

#include "vector.h"

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

/* ---------------------------------------------------------------- the cache */

static int64_t head_bytes(int32_t format, int32_t block_tokens, int32_t head_dim) {
    const int64_t values = 2 * (int64_t)block_tokens * head_dim;
    return format == KV_F32 ? 4 * values : format == KV_BF16 ? 2 * values : values + 8 * (int64_t)block_tokens;
}

int64_t kv_block_bytes(int32_t format, int32_t block_tokens, int32_t kv_heads, int32_t head_dim) {
    return kv_heads * head_bytes(format, block_tokens, head_dim);
}

static uint8_t *head_of(const cache_t *c, int32_t layer, int32_t block, int32_t head) {
    return c->data + layer * c->layer_bytes + block * c->block_bytes + head * head_bytes(c->format, c->block_tokens, c->head_dim);
}

/* The scales of a head's keys in a block; those of its values follow. */
static float *scales_of(const cache_t *c, uint8_t *head) { return (float *)(head + 2 * (int64_t)c->block_tokens * c->head_dim); }

/* to[i * stride] = x[i] in steps of the scale that makes the largest 127; stride 1 or more. */
static void write_int8(int8_t *to, int32_t stride, const float *x, int32_t n, float *scale) {
    int32_t i = 0;
    floats sizes = each(0);
    for (; i + LANES <= n; i += LANES)
        sizes = larger(sizes, size_of(load(x + i))); /* the second, where one is no number */
    float size = largest_of(sizes), by;
    for (; i < n; i++)
        size = size > fabsf(x[i]) ? size : fabsf(x[i]);
    *scale = size / 127;
    by = size > 0 ? 127 / size : 0;
    for (i = 0; i + LANES <= n; i += LANES) {
        const ints rounded = (ints)(load(x + i) * by + 12582912.0f) - 0x4b400000;
        for (int j = 0; j < LANES; j++)
            to[(int64_t)(i + j) * stride] = (int8_t)rounded[j];
    }
    for (; i < n; i++)
        to[(int64_t)i * stride] = (int8_t)lrintf(x[i] * by);
}

static void write_head(const cache_t *c, uint8_t *head, int32_t at, const float *k, const float *v) {
    const int32_t d = c->head_dim, bt = c->block_tokens;
    if (c->format == KV_F32) {
        float *keys = (float *)head, *values = keys + d * bt + at * d;
        for (int32_t i = 0; i < d; i++)
            keys[i * bt + at] = k[i], values[i] = v[i];
    } else if (c->format == KV_BF16) {
        uint16_t *keys = (uint16_t *)head, *values = keys + d * bt + at * d;
        for (int32_t i = 0; i < d; i++)
            keys[i * bt + at] = float_to_bf16(k[i]), values[i] = float_to_bf16(v[i]);
    } else {
        int8_t *keys = (int8_t *)head;
        float *scale = scales_of(c, head);
        write_int8(keys + at, bt, k, d, scale + at);
        write_int8(keys + d * bt + at * d, 1, v, d, scale + bt + at);
    }
}

void kv_write(const cache_t *c, int32_t layer, int32_t slot, const float *k, const float *v) {
    for (int32_t h = 0; h < c->kv_heads; h++)
        write_head(c, head_of(c, layer, slot / c->block_tokens, h), slot % c->block_tokens, k + h * c->head_dim, v + h * c->head_dim);
}

INLINE floats load_as(int32_t format, const uint8_t *base, int64_t i) {
    if (format == KV_F32)
        return load((const float *)base + i);
    if (format == KV_BF16)
        return from_bf16(*(const halves_at *)((const uint16_t *)base + i));
    return from_int8(*(const bytes_at *)((const int8_t *)base + i));
}

INLINE float load_one(int32_t format, const uint8_t *base, int64_t i) {
    if (format == KV_F32)
        return ((const float *)base)[i];
    return format == KV_BF16 ? bf16_to_float(((const uint16_t *)base)[i]) : (float)((const int8_t *)base)[i];
}

/* Copy the keys at..at+n-1 of a block to columns of k: [head_dim][TILE]; n is 16 at most, and a block may be shorter. */
INLINE void load_keys(int32_t format, const uint8_t *head, const float *scale, int32_t bt, int32_t d, int32_t at, int32_t n, float *k) {
    if (at + LANES <= bt) {
        const floats times = format == KV_INT8 ? load(scale + at) : each(1);
        for (int32_t i = 0; i < d; i++) {
            const floats x = load_as(format, head, (int64_t)i * bt + at);
            store(k + i * TILE, format == KV_INT8 ? x * times : x);
        }
        return;
    }
    for (int32_t i = 0; i < d; i++)
        for (int32_t j = 0; j < n; j++) {
            const float x = load_one(format, head, (int64_t)i * bt + at + j);
            k[i * TILE + j] = format == KV_INT8 ? x * scale[at + j] : x;
        }
}

INLINE void load_values(int32_t format, const uint8_t *head, const float *scale, int32_t bt, int32_t d, int32_t at, int32_t n, float *v) {
    const int32_t dp = padded(d);
    for (int32_t j = 0; j < n; j++) {
        const int64_t from = (int64_t)d * bt + (int64_t)(at + j) * d;
        const float times = format == KV_INT8 ? scale[bt + at + j] : 1;
        int32_t i = 0;
        for (; i + LANES <= d; i += LANES) {
            const floats x = load_as(format, head, from + i);
            store(v + j * dp + i, format == KV_INT8 ? x * times : x);
        }
        for (; i < d; i++) {
            const float x = load_one(format, head, from + i);
            v[j * dp + i] = format == KV_INT8 ? x * times : x;
        }
    }
}

/* Widen the keys and values of `keys` positions from key0 on, block by block, 16 positions at most at once. */
INLINE void load_tile_as(int32_t format, const cache_t *c, int32_t layer, const int32_t *table, int32_t h, int32_t key0, int32_t keys, room_t *r) {
    const int32_t bt = c->block_tokens, d = c->head_dim;
    for (int32_t j = 0, n; j < keys; j += n) {
        const int32_t at = (key0 + j) % bt;
        uint8_t *head = head_of(c, layer, table[(key0 + j) / bt], h);
        const float *scale = scales_of(c, head);
        n = least(least(LANES, bt - at), keys - j);
        load_keys(format, head, scale, bt, d, at, n, r->k + j);
        load_values(format, head, scale, bt, d, at, n, r->v + j * padded(d));
    }
}

static void load_tile(const cache_t *c, int32_t layer, const int32_t *table, int32_t h, int32_t key0, int32_t keys, room_t *r) {
    if (c->format == KV_F32)
        load_tile_as(KV_F32, c, layer, table, h, key0, keys, r);
    else if (c->format == KV_BF16)
        load_tile_as(KV_BF16, c, layer, table, h, key0, keys, r);
    else
        load_tile_as(KV_INT8, c, layer, table, h, key0, keys, r);
}

/* ---------------------------------------------------------------- products */

/* c = a b, a: [rows][lda], b: [k][ldb]; each sum in order of k, so that no row depends on which others are computed with it. */
INLINE void product_block(int rows, int vectors, int32_t k, const float *a, int32_t lda, const float *b, int32_t ldb, float *c, int32_t ldc) {
    floats sum[HIGH][WIDE];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++)
            sum[r][v] = each(0);
    for (int32_t i = 0; i < k; i++)
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            const floats left = each(a[r * lda + i]);
#pragma GCC unroll 2
            for (int v = 0; v < vectors; v++)
                sum[r][v] += left * load(b + i * ldb + v * LANES);
        }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++)
            store(c + r * ldc + v * LANES, sum[r][v]);
}

static void product(int32_t rows, int32_t n, int32_t k, const float *a, int32_t lda, const float *b, int32_t ldb, float *c, int32_t ldc) {
    int32_t j = 0;
    for (; j + WIDE * LANES <= n; j += WIDE * LANES) {
        int32_t r = 0;
        for (; r + HIGH <= rows; r += HIGH)
            product_block(HIGH, WIDE, k, a + r * lda, lda, b + j, ldb, c + r * ldc + j, ldc);
        for (; r + 2 <= rows; r += 2)
            product_block(2, WIDE, k, a + r * lda, lda, b + j, ldb, c + r * ldc + j, ldc);
        for (; r < rows; r++)
            product_block(1, WIDE, k, a + r * lda, lda, b + j, ldb, c + r * ldc + j, ldc);
    }
    for (; j < n; j += LANES)
        for (int32_t r = 0; r < rows; r++)
            product_block(1, 1, k, a + r * lda, lda, b + j, ldb, c + r * ldc + j, ldc);
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

/* Turn the scores of one row into weights; of its keys first..last-1 are seen, none where first >= last. */
static void soften(float *p, int32_t first, int32_t last, float softcap, float *largest, float *sum) {
    enum { N = TILE / LANES };
    floats s[N], top = each(-INFINITY), total = each(0);
    for (int v = 0; v < N; v++)
        s[v] = load(p + v * LANES);
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
        store(p + v * LANES, s[v]);
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

/* Attend to the tile from key0 on. */
static void attend_tile(const attend_t *a, const cache_t *c, int32_t layer, const task_t *t, int32_t key0, room_t *r, state_t *to) {
    const int32_t d = c->head_dim, dp = padded(d), keys = least(TILE, r->position[t->rows - 1] + 1 - key0);
    int32_t from = TILE;
    load_tile(c, layer, a->block_table + (int64_t)t->sequence * a->width, t->head, key0, keys, r);
    product(t->rows, padded(keys), d, r->q, d, r->k, TILE, r->p, TILE);
    for (int32_t row = 0; row < t->rows; row++) {
        const int32_t at = r->position[row];
        const int32_t first = a->window ? most(0, at - a->window + 1 - key0) : 0, last = least(TILE, at + 1 - key0);
        from = least(from, first);
        soften(r->p + row * TILE, first, last, a->softcap, to->largest + row, to->sum + row);
    }
    product(t->rows, dp, keys - from, r->p + from, TILE, r->v + from * dp, dp, to->values, dp);
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
    r.tile = state_at(&own, dp), r.part = state_at(&own, dp), r.all = state_at(&own, dp);
    return r;
}

int64_t attention_floats(int32_t d) {
    const int64_t dp = padded(d);
    return ROWS * dp + (int64_t)d * TILE + TILE * dp + ROWS * TILE + 3 * (2 * ROWS + ROWS * dp);
}

int64_t attention_shared_floats(int32_t threads, int32_t d) { return threads > 1 ? (int64_t)SHARED_ROWS * (padded(d) + 2) : 0; }

static int32_t rows_of(const attend_t *a, const cache_t *c, int32_t s) { return (a->first[s + 1] - a->first[s]) * (a->heads / c->kv_heads); }

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

void attend(const attend_t *a, const cache_t *c, int32_t layer, int split, int32_t *next, float *own, float *shared) {
    const int32_t d = c->head_dim, dp = padded(d);
    room_t r = room_at(own, d);
    task_t t = {0};
    int64_t before = 0;
    while (find(a, c, split, __atomic_fetch_add(next, 1, __ATOMIC_RELAXED), &before, &t)) {
        load_queries(a, c, &t, &r);
        const int32_t first = lowest(a, c, &t) / PART, last = r.position[t.rows - 1] / PART;
        if (split) {
            state_t mine = record_at(&t, shared, dp);
            if (t.part >= first)
                attend_part(a, c, layer, &t, t.part, &r, &mine);
            continue;
        }
        for (int32_t part = first; part <= last; part++) {
            attend_part(a, c, layer, &t, part, &r, part == first ? &r.all : &r.part);
            if (part != first)
                merge(&r.all, &r.part, t.rows, dp);
        }
        finish(a, c, &t, &r.all);
    }
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
