/* What this processor can do, by asking it. */
#ifndef MLSYS_CPU_H
#define MLSYS_CPU_H

#include <stdint.h>

enum { PORTABLE = 0, AVX2 = 1, AVX512 = 2, AVX512_BF16 = 3, AMX = 4 };

/* The best level of this processor, that its system lets programs use. */
int32_t cpu_best(void);

/* The level in use: the best, or the lower one asked for by cpu_use. */
int32_t cpu_level(void);

/* That level without tiles and pairs of bf16: of the vector registers. */
int32_t cpu_vector(void);

/* Whether the level in use multiplies pairs of bf16 in vector registers. */
int32_t cpu_has_pairs(void);

/* Whether lines of weights are asked for shortly before they are read: on AMD's processors, which read a stream ahead themselves. */
int32_t cpu_fetches_near(void);

/* Use no level above this one; returns the level then in use. */
int32_t cpu_use(int32_t level);

#endif
