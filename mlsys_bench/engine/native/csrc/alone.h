/* Operators of a step by themselves, several times in one run of the pool and as a step calls them: a barrier after each.  And what memory
 * does.  For measuring: no step comes here.  Which weights, block tables or vectors a time uses rotates, so that caches hold none of them.
 */
#ifndef MLSYS_ALONE_H
#define MLSYS_ALONE_H

#include "attention.h"
#include "linear.h"

/* y = w x by w[first % count], w[(first + 1) % count], …; y: [m, n]. */
void alone_linear(const linear_t *w, int32_t count, int32_t first, const act_t *a, float *y, int32_t threads, int32_t times);

/* x += out, y = norm(x), row by row: [m, n] each. */
void alone_norm(float *y, float *x, const float *out, int32_t m, int32_t n, float eps, int32_t threads, int32_t times);

/* y = silu(gate) up; wide: [m, 2 n] gate and up side by side, y: [m, n]. */
void alone_gate(float *y, const float *wide, int32_t m, int32_t n, int32_t gelu, int32_t threads, int32_t times);

/* x = rows of the table [.., n], F32 or BF16, that tokens[count, m] name, one row of tokens after the other; x: [m, n]. */
void alone_embed(float *x, const void *table, int32_t format, const int32_t *tokens, int32_t count, int32_t first, int32_t m, int32_t n,
                 int32_t threads, int32_t times);

/* What is done to q, k and v of m tokens before attention; qkv: [m, (heads + 2 kv_heads) head_dim], slots: [count, m]. */
typedef struct {
    float *qkv;
    int32_t m, heads, rope_dim, count;
    const int32_t *position, *slot;
    const float *cos, *sin; /* [positions, rope_dim / 2] */
} place_t;

/* Turn q and k, and store k and v, to one row of slots after the other. */
void alone_place(const place_t *p, const cache_t *c, int32_t first, int32_t threads, int32_t times);

/* Attend, by one of a[count] after the other.  room: alone_attend_floats() floats, 64-byte aligned. */
int64_t alone_attend_floats(int32_t threads, int32_t head_dim, int32_t times);
void alone_attend(const attend_t *a, int32_t count, int32_t first, const cache_t *c, int32_t threads, int32_t times, float *room);

/* Runs of the pool in which nothing is done. */
void alone_nothing(int32_t threads, int32_t times);

/* Memory, each thread its share; n floats.  Copies and sums go past the caches where the processor can do that. */
double alone_read(const float *x, int64_t n, int32_t threads); /* their sum */
void alone_copy(float *to, const float *from, int64_t n, int32_t threads);
void alone_triad(float *to, const float *a, const float *b, float scale, int64_t n, int32_t threads); /* to = a + scale b */

/* Of the cores the threads run on.  crowding: how much of them the threads have, by independent instructions, which a neighbour on the core's
 * other hyperthread slows, against a chain of them, which it hardly does; the clock cancels; of the most crowded; 0 where this compiler cannot
 * tell.  clock_hz: of the slowest, by that chain; 0 where nobody knows how many cycles a product takes. */
typedef struct {
    double crowding, clock_hz;
} core_t;

core_t alone_core(int32_t threads);

#endif
