// What this processor offers, asked at run time; and how the C library keeps freed memory.
#include "kernels.h"

#if defined(__GLIBC__)
#include <malloc.h>
#endif

#if defined(__x86_64__) && defined(__GNUC__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace qdiff {

#if defined(__x86_64__) && defined(__GNUC__)

namespace {

// The operating system must also save the tile registers: bits 17 and 18 of XCR0.
bool amx_int8() {
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & (1u << 27))) return false;
    unsigned low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    const unsigned tiles = (1u << 17) | (1u << 18);
    if ((low & tiles) != tiles || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    return (d & (1u << 24)) && (d & (1u << 25));
}

// The same products on 256-bit registers, of processors without AVX-512.
bool avx_vnni() {
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & (1u << 4));
}

}  // namespace

CpuFeatures cpu_features() {
    __builtin_cpu_init();
    CpuFeatures features{};
    features.avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    features.avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    features.avx512_vnni = features.avx512 && __builtin_cpu_supports("avx512vnni");
    features.avx_vnni = features.avx2 && avx_vnni();
    features.amx_int8 = amx_int8();
    return features;
}

#elif defined(__aarch64__) && defined(__linux__)

CpuFeatures cpu_features() {
    CpuFeatures features{};
    features.dotprod = (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
    return features;
}

#else

CpuFeatures cpu_features() { return {}; }

#endif

bool keep_freed_memory() {
#if defined(__GLIBC__)
    // bytes at the heap's end: with more of them free, all but so many go back. Those never touched cost no memory
    constexpr int kept = 1 << 30;
    return mallopt(M_MMAP_MAX, 0) && mallopt(M_TRIM_THRESHOLD, kept) && mallopt(M_TOP_PAD, kept);
#else
    return false;
#endif
}

}  // namespace qdiff
