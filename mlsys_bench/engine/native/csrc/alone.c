/* See alone.h. */
#include "alone.h"

#include <string.h>
#include <time.h>

#include "pool.h"
#include "rows.h"

static int64_t share(int64_t n, int32_t ith, int32_t nth) { return n * ith / nth; }

/* ---------------------------------------------------------------- products */

typedef struct {
    const linear_t *w;
    const act_t *a;
    float *y;
    int32_t count, first, times;
} linear_job;

static void linears(void *arg, int32_t ith, int32_t nth) {
    const linear_job *j = arg;
    for (int32_t i = 0; i < j->times; i++) {
        const linear_t *w = j->w + (j->first + i) % j->count;
        if (act_bytes(w, j->a->m)) {
            quantise_share(w, j->a, ith, nth);
            pool_barrier();
        }
        linear_share(w, j->a, j->y, w->n, ith, nth);
        pool_barrier();
    }
}

void alone_linear(const linear_t *w, int32_t count, int32_t first, const act_t *a, float *y, int32_t threads, int32_t times) {
    linear_job j = {w, a, y, count, first, times};
    pool_run(threads, linears, &j);
}

/* ---------------------------------------------------------------- rows */

typedef struct {
    float *y, *x;
    const float *from;
    int32_t m, n, gelu, times;
    float eps;
} rows_job;

static void norms(void *arg, int32_t ith, int32_t nth) {
    const rows_job *j = arg;
    for (int32_t i = 0; i < j->times; i++) {
        for (int64_t r = share(j->m, ith, nth); r < share(j->m, ith + 1, nth); r++) {
            add_row(j->x + r * j->n, j->from + r * j->n, j->n);
            norm_row(j->y + r * j->n, j->x + r * j->n, j->n, j->eps, NULL);
        }
        pool_barrier();
    }
}

void alone_norm(float *y, float *x, const float *out, int32_t m, int32_t n, float eps, int32_t threads, int32_t times) {
    rows_job j = {.y = y, .x = x, .from = out, .m = m, .n = n, .eps = eps, .times = times};
    pool_run(threads, norms, &j);
}

static void gates(void *arg, int32_t ith, int32_t nth) {
    const rows_job *j = arg;
    const int32_t panels = (j->n + 15) / 16, first = share(panels, ith, nth) * 16, end = share(panels, ith + 1, nth) * 16;
    for (int32_t i = 0; i < j->times; i++) {
        for (int64_t r = 0; r < j->m; r++) {
            const float *gate = j->from + r * 2 * j->n;
            gated_row(j->y + r * j->n, gate, gate + j->n, first, end < j->n ? end : j->n, j->gelu);
        }
        pool_barrier();
    }
}

void alone_gate(float *y, const float *wide, int32_t m, int32_t n, int32_t gelu, int32_t threads, int32_t times) {
    rows_job j = {.y = y, .from = wide, .m = m, .n = n, .gelu = gelu, .times = times};
    pool_run(threads, gates, &j);
}

typedef struct {
    float *x;
    const void *table;
    const int32_t *tokens;
    int32_t format, count, first, m, n, times;
} embed_job;

static void embeds(void *arg, int32_t ith, int32_t nth) {
    const embed_job *j = arg;
    for (int32_t i = 0; i < j->times; i++) {
        const int32_t *tokens = j->tokens + (int64_t)((j->first + i) % j->count) * j->m;
        for (int64_t t = share(j->m, ith, nth); t < share(j->m, ith + 1, nth); t++)
            embed_row(j->x + t * j->n, j->table, j->format, 0, tokens[t], j->n, 1);
        pool_barrier();
    }
}

void alone_embed(float *x, const void *table, int32_t format, const int32_t *tokens, int32_t count, int32_t first, int32_t m, int32_t n,
                 int32_t threads, int32_t times) {
    embed_job j = {x, table, tokens, format, count, first, m, n, times};
    pool_run(threads, embeds, &j);
}

/* ---------------------------------------------------------------- attention */

typedef struct {
    const place_t *p;
    const cache_t *c;
    int32_t first, times;
} place_job;

static void places(void *arg, int32_t ith, int32_t nth) {
    const place_job *j = arg;
    const place_t *p = j->p;
    const int32_t d = j->c->head_dim, kv_heads = j->c->kv_heads, group = p->heads / kv_heads, items = p->m * kv_heads;
    for (int32_t i = 0; i < j->times; i++) {
        const int32_t *slot = p->slot + (int64_t)((j->first + i) % p->count) * p->m;
        for (int32_t item = share(items, ith, nth); item < share(items, ith + 1, nth); item++) {
            const int32_t t = item / kv_heads, head = item % kv_heads;
            const int64_t at = (int64_t)p->position[t] * (p->rope_dim / 2);
            float *row = p->qkv + (int64_t)t * (p->heads + 2 * kv_heads) * d, *k = row + (p->heads + head) * d;
            rope_row(row + head * group * d, group, d, p->rope_dim, p->cos + at, p->sin + at);
            rope_row(k, 1, d, p->rope_dim, p->cos + at, p->sin + at);
            kv_write(j->c, 0, slot[t], head, k, k + kv_heads * d);
        }
        pool_barrier();
    }
}

void alone_place(const place_t *p, const cache_t *c, int32_t first, int32_t threads, int32_t times) {
    place_job j = {p, c, first, times};
    pool_run(threads, places, &j);
}

typedef struct {
    const attend_t *a;
    const cache_t *c;
    float *own, *shared;
    int32_t *next;
    int32_t count, first, threads, times;
} attend_job;

static void attends(void *arg, int32_t ith, int32_t nth) {
    const attend_job *j = arg;
    float *own = j->own + ith * attention_floats(j->c->head_dim);
    for (int32_t i = 0; i < j->times; i++) {
        const attend_t *a = j->a + (j->first + i) % j->count;
        const int split = attention_is_split(a, j->c, j->threads);
        attend(a, j->c, 0, split, j->next + i, own, j->shared);
        pool_barrier();
        if (split) {
            attend_merge(a, j->c, j->shared, ith, nth);
            pool_barrier();
        }
    }
}

int64_t alone_attend_floats(int32_t threads, int32_t head_dim, int32_t times) {
    return threads * attention_floats(head_dim) + attention_shared_floats(threads, head_dim) + times;
}

void alone_attend(const attend_t *a, int32_t count, int32_t first, const cache_t *c, int32_t threads, int32_t times, float *room) {
    attend_job j = {.a = a, .c = c, .own = room, .count = count, .first = first, .threads = threads, .times = times};
    j.shared = j.own + threads * attention_floats(c->head_dim);
    j.next = (int32_t *)(j.shared + attention_shared_floats(threads, c->head_dim));
    memset(j.next, 0, times * sizeof *j.next);
    pool_run(threads, attends, &j);
}

/* ---------------------------------------------------------------- the pool and the memory */

static void nothing(void *arg, int32_t ith, int32_t nth) { (void)arg, (void)ith, (void)nth; }

void alone_nothing(int32_t threads, int32_t times) {
    for (int32_t i = 0; i < times; i++) pool_run(threads, nothing, NULL);
}

typedef struct {
    float *to;
    const float *a, *b;
    float scale;
    int64_t n;
    double sum[256]; /* of each thread */
} memory_job;

/* The share of a thread, in whole vectors. */
typedef struct {
    int64_t first, n;
} part_t;

static part_t part_of(int64_t n, int32_t ith, int32_t nth) {
    const int64_t first = share(n / LANES, ith, nth) * LANES;
    return (part_t){first, share(n / LANES, ith + 1, nth) * LANES - first};
}

typedef float eight __attribute__((vector_size(32)));
typedef float eight_at __attribute__((vector_size(32), aligned(4), may_alias));

/* From front to back, 32 bytes at a time: loads of 64 read 4 to 7 % less, and so do several streams far apart, a third where they are a power
 * of two apart (Zen 4).  A few lines ahead are asked for: loads that only wait for memory leave the processor's own prefetcher a sixth behind
 * (Xeon with AMX: 14.5 GB/s without, 17.3 with 256 to 512 bytes ahead, 16.7 with sums that wait for each other). */
static void read_share(void *arg, int32_t ith, int32_t nth) {
    enum { SUMS = 4, AHEAD = 96 }; /* so many sums that no addition waits for the one before; floats ahead */
    memory_job *j = arg;
    const part_t p = part_of(j->n, ith, nth);
    const float *x = j->a + p.first;
    eight sum[SUMS] = {0};
    int64_t i = 0;
    for (; i + SUMS * 8 <= p.n; i += SUMS * 8) {
        for (int s = 0; s < SUMS * 8; s += 16) __builtin_prefetch(x + i + AHEAD + s);
        for (int s = 0; s < SUMS; s++) sum[s] += *(const eight_at *)(x + i + s * 8);
    }
    for (; i < p.n; i += 8) sum[0] += *(const eight_at *)(x + i);
    const eight all = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    for (int s = 0; s < 8; s++) j->sum[ith] += all[s];
}

double alone_read(const float *x, int64_t n, int32_t threads) {
    memory_job j = {.a = x, .n = n};
    double sum = 0;
    pool_run(threads, read_share, &j);
    for (int i = 0; i < 256; i++) sum += j.sum[i];
    return sum;
}

#ifdef __AVX2__
INLINE void store_past(float *p, eight v) { _mm256_stream_ps(p, (__m256)v); }
INLINE void stored(void) { _mm_sfence(); }
#else
INLINE void store_past(float *p, eight v) { *(eight_at *)p = v; }
INLINE void stored(void) {}
#endif

static void copy_share(void *arg, int32_t ith, int32_t nth) {
    const memory_job *j = arg;
    const part_t p = part_of(j->n, ith, nth);
    float *to = j->to + p.first;
    const float *from = j->a + p.first;
    for (int64_t i = 0; i < p.n; i += 16) {
        const eight low = *(const eight_at *)(from + i), high = *(const eight_at *)(from + i + 8);
        store_past(to + i, low);
        store_past(to + i + 8, high);
    }
    stored();
}

void alone_copy(float *to, const float *from, int64_t n, int32_t threads) {
    memory_job j = {.to = to, .a = from, .n = n};
    pool_run(threads, copy_share, &j);
}

static void triad_share(void *arg, int32_t ith, int32_t nth) {
    const memory_job *j = arg;
    const part_t p = part_of(j->n, ith, nth);
    float *to = j->to + p.first;
    const float *a = j->a + p.first, *b = j->b + p.first;
    const float s = j->scale;
    for (int64_t i = 0; i < p.n; i += 8) store_past(to + i, *(const eight_at *)(a + i) + s * *(const eight_at *)(b + i));
    stored();
}

void alone_triad(float *to, const float *a, const float *b, float scale, int64_t n, int32_t threads) {
    memory_job j = {.to = to, .a = a, .b = b, .scale = scale, .n = n};
    pool_run(threads, triad_share, &j);
}

/* ---------------------------------------------------------------- who else is on a core */

#if defined(__x86_64__)
#define FLOATS "+x"
#define CYCLES 3 /* of a product of 64 bits that the next one waits for: Intel since Nehalem, AMD since Zen (Fog, Instruction tables) */
#elif defined(__aarch64__)
#define FLOATS "+w"
#define CYCLES 0 /* 2 to 4, by the core: nobody can tell its clock by it */
#endif

#ifdef FLOATS
enum { CHAIN = 2500, SUMS = 4000, PRODUCTS = 2000, TRIES = 2 }; /* some 2 us each */

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

/* The compiler may assume nothing of what comes out. */
#define TIMES_BIG(x) x *= 0x9e3779b97f4a7c15u; __asm__ volatile("" : "+r"(x))
#define PLUS(x) x += 3; __asm__ volatile("" : "+r"(x))
#define TIMES(x) x *= one; __asm__ volatile("" : FLOATS(x))

/* Nanoseconds of products of which each needs the one before. */
static int64_t chain_ns(void) {
    uint64_t x = 3;
    const int64_t began = now_ns();
    for (int i = 0; i < CHAIN; i++) { TIMES_BIG(x); }
    return now_ns() - began;
}

/* Nanoseconds of sums, then of products, that need nothing of each other. */
static int64_t side_by_side_ns(void) {
    uint64_t a = 1, b = 2, c = 3, d = 4, e = 5, f = 6;
    double one = 1, p = 1, q = 1, r = 1, s = 1, t = 1, u = 1, v = 1, w = 1;
    __asm__ volatile("" : FLOATS(one));
    const int64_t began = now_ns();
    for (int i = 0; i < SUMS; i++) { PLUS(a); PLUS(b); PLUS(c); PLUS(d); PLUS(e); PLUS(f); }
    for (int i = 0; i < PRODUCTS; i++) { TIMES(p); TIMES(q); TIMES(r); TIMES(s); TIMES(t); TIMES(u); TIMES(v); TIMES(w); }
    return now_ns() - began;
}

/* Nanoseconds that reading the clock takes. */
static int64_t reading_ns(void) {
    const int64_t began = now_ns();
    return now_ns() - began;
}

static void look_at_core(void *arg, int32_t ith, int32_t nth) {
    (void)nth;
    int64_t reading = INT64_MAX, chain = INT64_MAX, side = INT64_MAX; /* the best of a few: an interrupt is no neighbour */
    for (int i = 0; i < TRIES; i++) {
        const int64_t r = reading_ns(), c = chain_ns(), s = side_by_side_ns();
        if (r < reading) reading = r;
        if (c < chain) chain = c;
        if (s < side) side = s;
    }
    ((core_t *)arg)[ith] = (core_t){(double)side / (double)chain, CYCLES * CHAIN * 1e9 / (double)(chain - reading)};
}

core_t alone_core(int32_t threads) {
    core_t of[256] = {0}, worst;
    pool_run(threads, look_at_core, of);
    worst = of[0];
    for (int i = 1; i < threads && i < 256; i++) {
        if (of[i].crowding > worst.crowding) worst.crowding = of[i].crowding;
        if (of[i].clock_hz < worst.clock_hz) worst.clock_hz = of[i].clock_hz;
    }
    return worst;
}
#else
core_t alone_core(int32_t threads) { return (core_t){threads * 0.0, 0}; }
#endif
