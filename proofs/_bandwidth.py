"""How fast this machine goes through memory with so many threads: a small C program, which answers each line with bytes a second.

It reads, copies (a = b) or adds (triad, a = b + 3 c), as its second argument says, and counts as STREAM does: bytes read and bytes written.
A line is answered with the median of seven passes; with a third argument P it is one pass through the next of P parts of the buffers.
What is written goes past the caches where the processor has such stores, as STREAM's compilers are told to make them.
Where there is no compiler, torch's functions take its place.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = r"""
#define _GNU_SOURCE
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <time.h>
#ifdef __AVX__
#include <immintrin.h>
#endif

enum { PASSES = 7, MOST = 64 };
static const size_t floats = (size_t)1 << 28; /* 1 GiB: beyond any cache */
static float *room, *from, *more; /* what is read is `room`, what is written too */
static size_t begins, count; /* what a pass goes through */
static int threads;
static volatile float kept[MOST * 16];

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

/* Front to back: the compiler makes of it what the processor adds fastest. */
static void *read_share(void *which) {
    size_t share = count / threads, i;
    const float *x = room + begins + share * (size_t)which;
    float sum = 0;
    for (i = 0; i < share; i++) sum += x[i];
    kept[16 * (size_t)which] = sum;
    return NULL;
}

#ifdef __AVX__
static void *copy_share(void *which) {
    size_t share = count / threads, i, at = begins + share * (size_t)which;
    for (i = at; i < at + share; i += 8) _mm256_stream_ps(room + i, _mm256_load_ps(from + i));
    _mm_sfence();
    return NULL;
}

static void *triad_share(void *which) {
    size_t share = count / threads, i, at = begins + share * (size_t)which;
    const __m256 three = _mm256_set1_ps(3);
    for (i = at; i < at + share; i += 8) {
        const __m256 product = _mm256_mul_ps(three, _mm256_load_ps(more + i));
        _mm256_stream_ps(room + i, _mm256_add_ps(_mm256_load_ps(from + i), product));
    }
    _mm_sfence();
    return NULL;
}
#else
static void *copy_share(void *which) {
    size_t share = count / threads, i, at = begins + share * (size_t)which;
    for (i = at; i < at + share; i++) room[i] = from[i];
    return NULL;
}

static void *triad_share(void *which) {
    size_t share = count / threads, i, at = begins + share * (size_t)which;
    for (i = at; i < at + share; i++) room[i] = from[i] + 3 * more[i];
    return NULL;
}
#endif

static void *(*work)(void *) = read_share;

static double pass(void) {
    pthread_t other[MOST];
    size_t i;
    double began = now();
    for (i = 1; i < (size_t)threads; i++) pthread_create(&other[i], NULL, work, (void *)i);
    work((void *)0);
    for (i = 1; i < (size_t)threads; i++) pthread_join(other[i], NULL);
    return now() - began;
}

static int ascending(const void *a, const void *b) { return (*(double *)a > *(double *)b) - (*(double *)a < *(double *)b); }

static float *taken(void) {
    float *made = aligned_alloc((size_t)1 << 21, floats * sizeof(float));
    if (!made) exit(1);
#ifdef MADV_HUGEPAGE
    madvise(made, floats * sizeof(float), MADV_HUGEPAGE);
#endif
    memset(made, 1, floats * sizeof(float));
    return made;
}

/* Seconds: of one pass through the next part, or the median of several through all. */
static double took(int parts) {
    static int part = 0;
    double each[PASSES];
    int i;
    count = floats / (parts ? parts : 1);
    if (parts) {
        begins = count * (size_t)(part++ % parts);
        return pass();
    }
    for (i = 0; i < PASSES; i++) each[i] = pass();
    qsort(each, PASSES, sizeof *each, ascending);
    return each[PASSES / 2];
}

static long forced_off(void) {
    struct rusage used;
    getrusage(RUSAGE_SELF, &used);
    return used.ru_nivcsw;
}

int main(int words, char **word) {
    char line[64];
    const char *way = words > 2 ? word[2] : "read";
    int buffers = 1, parts = words > 3 ? atoi(word[3]) : 0;
    threads = words > 1 ? atoi(word[1]) : 1;
    if (!strcmp(way, "copy")) work = copy_share, buffers = 2;
    if (!strcmp(way, "triad")) work = triad_share, buffers = 3;
    if (threads < 1 || threads > MOST) return 1;
    room = taken();
    if (buffers > 1) from = taken();
    if (buffers > 2) more = taken();
    puts("{}");
    fflush(stdout);
    while (fgets(line, sizeof line, stdin)) {
        const long before = forced_off();
        const double seconds = took(parts);
        printf("{\"rate\": %.0f, \"involuntary\": %ld}\n", (double)buffers * count * sizeof(float) / seconds, forced_off() - before);
        fflush(stdout);
    }
    return 0;
}
"""

TORCH = """
import json, statistics, sys, time, torch
torch.set_num_threads(int(sys.argv[1]))
matrix, vector = torch.ones(2**16, 2**12), torch.ones(2**12)
way = sys.argv[2] if len(sys.argv) > 2 else "read"
a, b = (torch.ones_like(matrix) for _ in range(2)) if way != "read" else (matrix, matrix)
work = {
    "read": lambda: torch.mv(matrix, vector), "copy": lambda: a.copy_(matrix), "triad": lambda: torch.add(matrix, b, alpha=3.0, out=a),
}[way]
buffers = {"read": 1, "copy": 2, "triad": 3}[way]
passes = 1 if len(sys.argv) > 3 else 7
print("{}", flush=True)
for _ in sys.stdin:
    took = []
    for _ in range(passes):
        began = time.perf_counter()
        work()
        took.append(time.perf_counter() - began)
    print(json.dumps({"rate": 4 * buffers * matrix.numel() / statistics.median(took), "involuntary": 0}), flush=True)
"""


def command(threads: int, *flags: str) -> list[str]:
    """Return the command of a process that goes through 1 GiB, or as much in each buffer, for each line.  flags: of the compiler."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return [sys.executable, "-c", TORCH, str(threads)]
    folder = Path(tempfile.gettempdir()) / f"mlsys-proof-read-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    made = folder / "-".join(("read", *flags))
    (folder / "read.c").write_text(SOURCE)
    subprocess.run([compiler, "-O3", "-march=native", *flags, "-ffast-math", "-pthread", "-o", made, folder / "read.c"], check=True)
    return [str(made), str(threads)]
