/* The threads of the engine: they spin while steps follow closely, sleep soon when not, and give way when others want their cores.
 *
 * One pool a process, made on first use and anew after fork.  Runs of several callers take turns.
 */
#ifndef MLSYS_POOL_H
#define MLSYS_POOL_H

#include <stdint.h>

typedef void (*pool_work)(void *arg, int32_t ith, int32_t nth);

/* Call work(arg, ith, nth) for ith = 0..nth-1, each on a thread of its own, 0 on the caller's; return when all are done.
 * nth is `threads`, or fewer where the system grants no more. */
void pool_run(int32_t threads, pool_work work, void *arg);

/* Wait, inside a run, until all its threads have come here. */
void pool_barrier(void);

#endif
