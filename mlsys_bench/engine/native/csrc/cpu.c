#include "cpu.h"

#include <stdatomic.h>

/* Whether this compiler knows tiles: linear_amx.c. */
int32_t linear_has_tiles(void);

#if defined(MLSYS_EMULATE_TILES)
/* Tiles in plain C, and nothing else that is particular: see linear_amx.c. */
static int32_t ask(void) { return AMX; }
static int has_pairs(void) { return 0; }
static int is_amd(void) { return 0; }
#elif defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18, AUTH = 0x68747541, HYGO = 0x6f677948 }; /* the latter two: how makers' names begin */

static uint64_t enabled_state(void) {
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low | (uint64_t)high << 32;
}

static int has(uint32_t word, int bit) { return (word >> bit) & 1; }

/* Tiles are switched on per process, on demand. */
static int tiles_granted(uint64_t state) {
    return (state >> 17 & 3) == 3 && syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}

/* Whether AMD made it, or Hygon by its plans. */
static int is_amd(void) {
    uint32_t a, b, c, d;
    return __get_cpuid(0, &a, &b, &c, &d) && (b == AUTH || b == HYGO);
}

/* Whether AVX512 multiplies pairs of bf16. */
static int has_pairs(void) {
#ifdef MLSYS_OLD_ASSEMBLER
    return 0;
#else
    uint32_t a, b, c, d;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && has(a, 5);
#endif
}

static int32_t ask(void) {
    uint32_t a, b, c, d, b7, c7, d7;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !has(c, 27)) return PORTABLE; /* 27: OSXSAVE */
    int has_fma = has(c, 12), has_f16c = has(c, 29);
    if (!__get_cpuid_count(7, 0, &a, &b7, &c7, &d7)) return PORTABLE;
    uint64_t state = enabled_state();
    if (!(has(b7, 5) && has_fma && has_f16c && (state & 6) == 6)) return PORTABLE;
    int has_512 = has(b7, 16) && has(b7, 17) && has(b7, 30) && has(b7, 31) && has(c7, 11); /* F, DQ, BW, VL, VNNI */
    if (!has_512 || (state & 0xe6) != 0xe6) return AVX2;
    if (has(d7, 22) && has(d7, 24) && has(d7, 25) && linear_has_tiles() && tiles_granted(state)) return AMX; /* BF16, TILE, INT8 */
    return has_pairs() ? AVX512_BF16 : AVX512;
}
#else
static int32_t ask(void) { return PORTABLE; }
static int has_pairs(void) { return 0; }
static int is_amd(void) { return 0; }
#endif

static _Atomic int32_t best = -1, used = -1, pairs = 0, near = 0;

int32_t cpu_best(void) {
    if (atomic_load(&best) < 0) atomic_store(&best, ask());
    return atomic_load(&best);
}

int32_t cpu_level(void) {
    int32_t now = atomic_load_explicit(&used, memory_order_relaxed);
    return now >= 0 ? now : cpu_use(AMX);
}

int32_t cpu_vector(void) {
#if defined(MLSYS_EMULATE_TILES)
    return PORTABLE;
#else
    return cpu_level() < AVX512 ? cpu_level() : AVX512;
#endif
}

int32_t cpu_has_pairs(void) { return cpu_level() >= AVX512_BF16 && atomic_load_explicit(&pairs, memory_order_relaxed); }

int32_t cpu_fetches_near(void) { return cpu_level() >= AVX2 && atomic_load_explicit(&near, memory_order_relaxed); }

int32_t cpu_use(int32_t level) {
    int32_t now = level < cpu_best() ? level : cpu_best();
    atomic_store(&pairs, has_pairs()); /* kept: asking takes microseconds on a virtual machine */
    atomic_store(&near, is_amd());
    if (now == AVX512_BF16 && !pairs) now = AVX512; /* a machine may have tiles and hide the rest */
    atomic_store(&used, now);
    return now;
}
