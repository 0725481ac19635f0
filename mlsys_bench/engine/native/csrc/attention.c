/* See attention.h. */
#include "attention.h"

#include "attention_tile.h"

#define PART (8 * TILE)    /* keys that one thread takes where contexts are shared */
#define SHARED_ROWS 16384  /* room for parts of contexts, in rows of a head */

/* The memory of a thread. */
typedef struct {
    view_t view;
    state_t tile, part, all;
} room_t;

/* Rows row0 .. row0 + rows - 1 of a sequence and a KV head; row r is query r / group and head r % group of the group. */
typedef struct {
    int32_t sequence, head, row0, rows, part; /* part -1: all */
    int64_t record;
} task_t;

static int32_t parts_of(int32_t n, int32_t size) { return (n + size - 1) / size; }

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

static void look(const attend_t *a, const cache_t *c, int32_t layer, const task_t *t, view_t *w) {
    w->c = c, w->layer = layer, w->head = t->head, w->how = tile_how(c), w->rows = t->rows;
    w->table = a->block_table + (int64_t)t->sequence * a->width, w->window = a->window, w->softcap = a->softcap;
    for (int32_t row = 0; row < t->rows; row++) {
        const int32_t query = query_of(a, c, t, row);
        w->position[row] = a->position[query];
        tile_query(w, row, a->q + (int64_t)query * a->ldq + head_of_row(a, c, t, row) * c->head_dim, a->scale);
    }
}

/* The first position that any row sees. */
static int32_t lowest(const view_t *w) { return w->window ? most(0, w->position[0] - w->window + 1) : 0; }

/* The first part that any row of a task sees. */
static int32_t first_part(const attend_t *a, const cache_t *c, const task_t *t) {
    return a->window ? most(0, a->position[query_of(a, c, t, 0)] - a->window + 1) / PART : 0;
}

/* Attend to one part, which the rows see some of. */
static void attend_part(int32_t part, room_t *r, state_t *to) {
    view_t *w = &r->view;
    const int32_t first = most(part * PART, lowest(w) / TILE * TILE);
    const int32_t end = least((part + 1) * PART, w->position[w->rows - 1] + 1);
    for (int32_t key0 = first; key0 < end; key0 += TILE) {
        tile_attend(w, key0, key0 == first ? to : &r->tile);
        if (key0 != first)
            merge(to, &r->tile, w->rows, padded(w->c->head_dim));
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
    room_t r;
    own = tile_room(&r.view, d, own);
    r.tile = state_at(&own, dp), r.part = state_at(&own, dp), r.all = state_at(&own, dp);
    return r;
}

int64_t attention_floats(int32_t d) {
    const int64_t dp = padded(d);
    return tile_floats(d) + 3 * (2 * ROWS + ROWS * dp);
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
static void attend_whole(const attend_t *a, const task_t *t, room_t *r) {
    const view_t *w = &r->view;
    const int32_t first = lowest(w) / PART, last = w->position[w->rows - 1] / PART;
    for (int32_t part = first; part <= last; part++) {
        attend_part(part, r, part == first ? &r->all : &r->part);
        if (part != first)
            merge(&r->all, &r->part, w->rows, padded(w->c->head_dim));
    }
    finish(a, w->c, t, &r->all);
}

void attend(const attend_t *a, const cache_t *c, int32_t layer, int split, int32_t *next, float *own, float *shared) {
    room_t r = room_at(own, c->head_dim);
    task_t t = {0};
    int64_t before = 0;
    while (find(a, c, split, __atomic_fetch_add(next, 1, __ATOMIC_RELAXED), &before, &t)) {
        look(a, c, layer, &t, &r.view);
        if (!split) {
            attend_whole(a, &t, &r);
            continue;
        }
        state_t mine = record_at(&t, shared, padded(c->head_dim));
        if (t.part >= first_part(a, c, &t))
            attend_part(t.part, &r, &mine);
    }
}

int attention_is_by_head(const attend_t *a, const cache_t *c) { return a->tokens == 1 && rows_of(a, c, 0) <= ROWS; }

void attend_head(const attend_t *a, const cache_t *c, int32_t layer, int32_t head, float *own) {
    room_t r = room_at(own, c->head_dim);
    const task_t t = {.head = head, .rows = rows_of(a, c, 0), .part = -1};
    look(a, c, layer, &t, &r.view);
    attend_whole(a, &t, &r);
}

void attend_merge(const attend_t *a, const cache_t *c, float *shared, int32_t ith, int32_t nth) {
    const int32_t dp = padded(c->head_dim);
    task_t t = {0};
    int64_t before = 0;
    for (int64_t number = 0; find(a, c, 1, number, &before, &t); number++) {
        if (t.part != first_part(a, c, &t) || (t.sequence * c->kv_heads + t.head) % nth != ith)
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
