#define _GNU_SOURCE
#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>

enum { MOST_THREADS = 256, LONG_SPIN_NS = 60000, SHORT_SPIN_NS = 3000, WINDOW_NS = 20000000, BUSY_SWITCHES_PER_S = 60 };

/* A word that threads wait on until it changes. */
typedef struct {
    _Alignas(64) _Atomic uint32_t word;
    _Atomic int32_t sleepers;
} gate_t;

static gate_t begun, arrived, done; /* begun: number of the run << 9 | its threads */
static _Alignas(64) _Atomic int32_t waiting, running;
static _Alignas(64) pool_work work_now;
static void *arg_now;
static _Atomic int64_t spin_ns = LONG_SPIN_NS;
static int32_t workers; /* alive, apart from the callers */
static pthread_t worker_ids[MOST_THREADS];
static pthread_mutex_t turn = PTHREAD_MUTEX_INITIALIZER, bed = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t alarm_clock = PTHREAD_COND_INITIALIZER;
static _Thread_local int32_t threads_here; /* of the run this thread is in, 0 outside */

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static void rest(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Wait until the gate's word is no longer `seen`, and return it: awake for a while, then asleep. */
static uint32_t wait_at(gate_t *gate, uint32_t seen) {
    int64_t until = 0, spin = atomic_load_explicit(&spin_ns, memory_order_relaxed);
    uint32_t word;
    for (int32_t i = 0; spin; i++) {
        if ((word = atomic_load_explicit(&gate->word, memory_order_acquire)) != seen) return word;
        rest();
        if (i % 8 != 7) continue;
        if (!until) until = now_ns() + spin;
        else if (now_ns() > until) break;
    }
    pthread_mutex_lock(&bed);
    atomic_fetch_add(&gate->sleepers, 1);
    while ((word = atomic_load(&gate->word)) == seen) pthread_cond_wait(&alarm_clock, &bed);
    atomic_fetch_sub(&gate->sleepers, 1);
    pthread_mutex_unlock(&bed);
    return word;
}

static void open_gate(gate_t *gate, uint32_t word) {
    atomic_store(&gate->word, word);
    if (!atomic_load(&gate->sleepers)) return;
    pthread_mutex_lock(&bed);
    pthread_cond_broadcast(&alarm_clock);
    pthread_mutex_unlock(&bed);
}

void pool_barrier(void) {
    if (threads_here <= 1) return;
    uint32_t seen = atomic_load_explicit(&arrived.word, memory_order_relaxed);
    if (atomic_fetch_add(&waiting, 1) + 1 < threads_here) {
        wait_at(&arrived, seen);
        return;
    }
    atomic_store_explicit(&waiting, 0, memory_order_relaxed);
    open_gate(&arrived, seen + 1);
}

static void take_part(int32_t ith, int32_t nth) {
    threads_here = nth;
    work_now(arg_now, ith, nth);
    threads_here = 0;
    if (atomic_fetch_sub(&running, 1) == 1) open_gate(&done, atomic_load_explicit(&done.word, memory_order_relaxed) + 1);
}

typedef struct {
    int32_t ith;
    uint32_t seen;
} birth_t;

static birth_t births[MOST_THREADS];

static void *worker(void *arg) {
    const birth_t *birth = arg;
    int32_t ith = birth->ith;
    for (uint32_t seen = birth->seen;;) {
        seen = wait_at(&begun, seen);
        int32_t nth = (int32_t)(seen & 511);
        if (ith < nth) take_part(ith, nth);
    }
    return NULL;
}

static void forget_workers(void) {
    workers = 0;
    memset(&begun, 0, sizeof begun);
    memset(&arrived, 0, sizeof arrived);
    memset(&done, 0, sizeof done);
    waiting = running = 0;
    threads_here = 0;
    pthread_mutex_init(&turn, NULL);
    pthread_mutex_init(&bed, NULL);
    pthread_cond_init(&alarm_clock, NULL);
}

/* Have `wanted` workers, if the system grants so many; they leave signals to the program's own threads. */
static void grow(int32_t wanted) {
    static int is_known;
    if (!is_known && pthread_atfork(NULL, NULL, forget_workers) == 0) is_known = 1;
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (workers < wanted) {
        births[workers] = (birth_t){workers + 1, atomic_load(&begun.word)};
        if (pthread_create(worker_ids + workers, NULL, worker, births + workers)) break;
        pthread_detach(worker_ids[workers]);
        workers++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

/* Cores that the caller may use; where that has changed, workers follow. */
static int32_t follow_affinity(void) {
#ifdef __linux__
    static cpu_set_t known;
    static int32_t told;
    cpu_set_t allowed;
    if (sched_getaffinity(0, sizeof allowed, &allowed)) return MOST_THREADS;
    if (!CPU_EQUAL(&allowed, &known)) told = 0;
    known = allowed;
    told = told < workers ? told : workers;
    for (; told < workers; told++) pthread_setaffinity_np(worker_ids[told], sizeof allowed, &allowed);
    return CPU_COUNT(&allowed);
#else
    return MOST_THREADS;
#endif
}

/* Whether other programs keep taking cores from this one: its threads are interrupted more often than a quiet system does. */
static int is_contended(void) {
    static int64_t since_ns, switches;
    static int verdict;
    int64_t now = now_ns();
    if (now - since_ns < WINDOW_NS) return verdict;
    struct rusage use;
    getrusage(RUSAGE_SELF, &use);
    if (now - since_ns < 50 * (int64_t)WINDOW_NS) verdict = (use.ru_nivcsw - switches) * 1000000000LL > BUSY_SWITCHES_PER_S * (now - since_ns);
    since_ns = now;
    switches = use.ru_nivcsw;
    return verdict;
}

static void run_with(int32_t threads, pool_work work, void *arg) {
    if (workers < threads - 1) grow(threads - 1);
    int32_t nth = threads < workers + 1 ? threads : workers + 1;
    int32_t cores = follow_affinity();
    atomic_store_explicit(&spin_ns, cores < nth ? 0 : is_contended() ? SHORT_SPIN_NS : LONG_SPIN_NS, memory_order_relaxed);
    uint32_t last = atomic_load_explicit(&done.word, memory_order_relaxed);
    work_now = work;
    arg_now = arg;
    atomic_store(&running, nth);
    open_gate(&begun, ((atomic_load(&begun.word) >> 9) + 1) << 9 | (uint32_t)nth);
    take_part(0, nth);
    wait_at(&done, last);
}

void pool_run(int32_t threads, pool_work work, void *arg) {
    int32_t before = threads_here;
    if (threads <= 1 || before) {
        threads_here = 1;
        work(arg, 0, 1);
        threads_here = before;
        return;
    }
    pthread_mutex_lock(&turn);
    run_with(threads < MOST_THREADS ? threads : MOST_THREADS, work, arg);
    pthread_mutex_unlock(&turn);
}
