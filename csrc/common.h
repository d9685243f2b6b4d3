// What every kernel shares: instruction-set clones, threads, and the quantiser itself.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

#ifdef _OPENMP
#include <omp.h>
#endif

// A function marked QDIFF_CLONES is compiled for AVX-512, AVX2 and the baseline; the loader picks one at run time.
// It needs GCC's ifunc support; elsewhere the baseline build (NEON on aarch64) is the only one.
// Keep OpenMP out of such functions: GCC gives the outlined loop bodies the baseline instruction set.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define QDIFF_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define QDIFF_FUSED 1  // two of the three clones have the instruction; in the third it is an exact, slow call
#else
#define QDIFF_CLONES
#if defined(__FMA__) || defined(__aarch64__)
#define QDIFF_FUSED 1
#endif
#endif

// Where intrinsics say more than a vectorised loop can, a function beside the clones uses them; has_avx512() decides.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define QDIFF_HAS_AVX512 1
#endif

// The body of a clone must be inlined into it, or it would run with the baseline instruction set.
#define QDIFF_INLINE inline __attribute__((always_inline))
#define QDIFF_RESTRICT __restrict__

namespace qdiff {

inline int max_threads() {
#ifdef _OPENMP
    return omp_get_max_threads();
#else
    return 1;
#endif
}

inline int thread_index() {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

#ifdef QDIFF_HAS_AVX512
inline bool has_avx512() {
    static const bool available = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                                  __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
    return available;
}
#endif

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// a b + c, rounded once where the processor can. Never used in quantisation, whose product is rounded on its own.
QDIFF_INLINE float multiply_add(float a, float b, float c) {
#ifdef QDIFF_FUSED
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

// Below this many elements a parallel region costs more than it saves.
constexpr int64_t kParallelElements = 16384;

// q = clamp(rint(x * inverse) + z, lo, hi), stored as q or as q + 128.
struct Quantizer {
    float inverse;                 // float32(1 / s)
    const float* channel_inverse;  // [C] or null: inverse becomes float32(inverse * channel_inverse[k])
    float low, high;               // lo - z and hi - z: bounds of the rounded product, clamped before it is an integer
    int32_t offset;                // z, and 128 more for unsigned storage

    uint8_t zero_byte() const { return static_cast<uint8_t>(offset); }
};

inline Quantizer make_quantizer(double scale, const float* channel_inverse, int zero_point, int low, int high,
                                bool unsigned_storage) {
    return {static_cast<float>(1.0 / scale), channel_inverse, static_cast<float>(low - zero_point),
            static_cast<float>(high - zero_point), zero_point + (unsigned_storage ? 128 : 0)};
}

// Adding 1.5 * 2^23 leaves the nearest integer (ties to even) in the low bits of the float: one exact rounding on
// every instruction set. Clamping first is the same as clamping last, because the bounds are integers.
QDIFF_INLINE uint8_t quantize_value(float x, float inverse, const Quantizer& quantizer) {
    float v = x * inverse;
    v = v > quantizer.low ? v : quantizer.low;
    v = v < quantizer.high ? v : quantizer.high;
    const float shifted = v + 12582912.0f;
    int32_t bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    return static_cast<uint8_t>(bits + quantizer.offset);
}

}  // namespace qdiff
