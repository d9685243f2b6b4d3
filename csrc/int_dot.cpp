// The exact integer inner product: acc[m, n] = sum over k of a[m, k] w[n, k], a and w widened to int16.
// Pairs of products fit int32 (pmaddwd); the faster 8-bit pmaddubsw saturates and would not be exact.
#include "int_dot.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define QDIFF_X86 1
#include <immintrin.h>
#endif

namespace qdiff {
namespace {

// acc [rows, 32] = a [rows, pairs, 2] times one panel [pairs, 32, 2].
using Dot = void (*)(const int16_t* a, const int16_t* panel, int64_t pairs, int64_t rows, int32_t* acc);
struct DotKernel {
    const char* name;
    Dot run;
};

void dot_plain(const int16_t* a, const int16_t* panel, int64_t pairs, int64_t rows, int32_t* acc) {
    for (int64_t m = 0; m < rows; ++m, a += 2 * pairs, acc += kPanel) {
        int32_t sums[kPanel] = {};
        for (int64_t p = 0; p < pairs; ++p) {
            const int16_t* w = panel + p * 2 * kPanel;
            const int32_t even = a[2 * p], odd = a[2 * p + 1];
            for (int64_t n = 0; n < kPanel; ++n) sums[n] += even * w[2 * n] + odd * w[2 * n + 1];
        }
        std::memcpy(acc, sums, sizeof sums);
    }
}

#ifdef QDIFF_X86

inline int32_t pair_at(const int16_t* a) {
    int32_t pair;
    std::memcpy(&pair, a, sizeof pair);
    return pair;
}

// 12 rows by 32 channels keep 24 of the 32 registers busy and two products per broadcast.
template <int rows>
__attribute__((target("avx512f,avx512bw"))) void block_avx512(const int16_t* a, const int16_t* panel, int64_t pairs,
                                                              int32_t* acc) {
    __m512i left[rows], right[rows];
#pragma GCC unroll 12
    for (int m = 0; m < rows; ++m) left[m] = right[m] = _mm512_setzero_si512();
    for (int64_t p = 0; p < pairs; ++p) {
        const __m512i w_left = _mm512_loadu_si512(panel + p * 2 * kPanel);
        const __m512i w_right = _mm512_loadu_si512(panel + p * 2 * kPanel + kPanel);
#pragma GCC unroll 12
        for (int m = 0; m < rows; ++m) {
            const __m512i pair = _mm512_set1_epi32(pair_at(a + (m * pairs + p) * 2));
            left[m] = _mm512_add_epi32(left[m], _mm512_madd_epi16(pair, w_left));
            right[m] = _mm512_add_epi32(right[m], _mm512_madd_epi16(pair, w_right));
        }
    }
#pragma GCC unroll 12
    for (int m = 0; m < rows; ++m) {
        _mm512_storeu_si512(acc + m * kPanel, left[m]);
        _mm512_storeu_si512(acc + m * kPanel + kPanel / 2, right[m]);
    }
}

void dot_avx512(const int16_t* a, const int16_t* panel, int64_t pairs, int64_t rows, int32_t* acc) {
    int64_t m = 0;
    for (; m + 12 <= rows; m += 12) block_avx512<12>(a + m * 2 * pairs, panel, pairs, acc + m * kPanel);
    for (; m + 4 <= rows; m += 4) block_avx512<4>(a + m * 2 * pairs, panel, pairs, acc + m * kPanel);
    for (; m < rows; ++m) block_avx512<1>(a + m * 2 * pairs, panel, pairs, acc + m * kPanel);
}

// Half a panel at a time: 4 rows by 16 channels fill 8 of the 16 registers.
template <int rows>
__attribute__((target("avx2"))) void block_avx2(const int16_t* a, const int16_t* panel, int64_t pairs, int32_t* acc) {
    for (int64_t half = 0; half < kPanel; half += kPanel / 2) {
        __m256i left[rows], right[rows];
#pragma GCC unroll 4
        for (int m = 0; m < rows; ++m) left[m] = right[m] = _mm256_setzero_si256();
        for (int64_t p = 0; p < pairs; ++p) {
            const int16_t* w = panel + p * 2 * kPanel + half * 2;
            const __m256i w_left = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w));
            const __m256i w_right = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + 16));
#pragma GCC unroll 4
            for (int m = 0; m < rows; ++m) {
                const __m256i pair = _mm256_set1_epi32(pair_at(a + (m * pairs + p) * 2));
                left[m] = _mm256_add_epi32(left[m], _mm256_madd_epi16(pair, w_left));
                right[m] = _mm256_add_epi32(right[m], _mm256_madd_epi16(pair, w_right));
            }
        }
#pragma GCC unroll 4
        for (int m = 0; m < rows; ++m) {
            int32_t* out = acc + m * kPanel + half;
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), left[m]);
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 8), right[m]);
        }
    }
}

void dot_avx2(const int16_t* a, const int16_t* panel, int64_t pairs, int64_t rows, int32_t* acc) {
    int64_t m = 0;
    for (; m + 4 <= rows; m += 4) block_avx2<4>(a + m * 2 * pairs, panel, pairs, acc + m * kPanel);
    for (; m < rows; ++m) block_avx2<1>(a + m * 2 * pairs, panel, pairs, acc + m * kPanel);
}

DotKernel choose_dot() {
    const CpuFeatures features = cpu_features();
    const char* limit = std::getenv("QDIFF_CPU_ISA");  // lets the tests reach the kernels of older processors
    const bool plain = limit && std::strcmp(limit, "default") == 0, avx2 = limit && std::strcmp(limit, "avx2") == 0;
    if (features.avx512 && !plain && !avx2) return {"avx512", dot_avx512};
    if (features.avx2 && !plain) return {"avx2", dot_avx2};
    return {"default", dot_plain};
}

#else

DotKernel choose_dot() { return {"default", dot_plain}; }

#endif

const DotKernel& dot_kernel() {
    static const DotKernel kernel = choose_dot();
    return kernel;
}

template <bool unsigned_storage>
QDIFF_INLINE void widen_values(const uint8_t* QDIFF_RESTRICT q, int16_t* QDIFF_RESTRICT to, int64_t count) {
    for (int64_t i = 0; i < count; ++i)
        to[i] = unsigned_storage ? static_cast<int16_t>(q[i] - 128) : static_cast<int16_t>(static_cast<int8_t>(q[i]));
}

QDIFF_CLONES void widen_signed(const uint8_t* q, int16_t* to, int64_t count) { widen_values<false>(q, to, count); }
QDIFF_CLONES void widen_unsigned(const uint8_t* q, int16_t* to, int64_t count) { widen_values<true>(q, to, count); }

// y = float(acc - z wsum) * (s s_w) + bias + temb + residual over some output channels of one row.
QDIFF_CLONES void finish_row(const int32_t* QDIFF_RESTRICT acc, int64_t count, int32_t zero_point, float scale,
                             const int32_t* QDIFF_RESTRICT sums, const float* QDIFF_RESTRICT weight_scale,
                             const float* QDIFF_RESTRICT bias, const float* QDIFF_RESTRICT temb,
                             const float* QDIFF_RESTRICT residual, float* QDIFF_RESTRICT y) {
    for (int64_t n = 0; n < count; ++n)
        y[n] = static_cast<float>(acc[n] - zero_point * sums[n]) * (scale * weight_scale[n]);
    if (bias)
        for (int64_t n = 0; n < count; ++n) y[n] += bias[n];
    if (temb)
        for (int64_t n = 0; n < count; ++n) y[n] += temb[n];
    if (residual)
        for (int64_t n = 0; n < count; ++n) y[n] += residual[n];
}

void write_row(const Output& out, const int32_t* acc, int64_t row, int64_t channel, int64_t count) {
    const int64_t at = row * out.channels + channel;
    if (out.accumulators) {
        std::memcpy(out.accumulators + at, acc, count * sizeof(int32_t));
        return;
    }
    const int64_t border = out.class_index ? out.class_index[row % out.pixels] : 0;
    finish_row(acc, count, out.zero_point, out.scale, out.weight_sums + border * out.channels + channel,
               out.weight_scale + channel, out.bias ? out.bias + channel : nullptr,
               out.temb ? out.temb + row / out.pixels * out.channels + channel : nullptr,
               out.residual ? out.residual + at : nullptr, out.y + at);
}

}  // namespace

const char* dot_kernel_name() { return dot_kernel().name; }

void widen(const uint8_t* q, bool unsigned_storage, int16_t* to, int64_t count) {
    unsigned_storage ? widen_unsigned(q, to, count) : widen_signed(q, to, count);
}

void pack_panels(const int8_t* weight, int16_t* panels, int64_t n, int64_t k) {
    const int64_t pairs = ceil_div(k, 2);
    std::memset(panels, 0, packed_size(n, k) * sizeof(int16_t));
    for (int64_t row = 0; row < n; ++row) {
        int16_t* panel = panels + row / kPanel * pairs * kPanel * 2 + row % kPanel * 2;
        for (int64_t i = 0; i < k; ++i) panel[i / 2 * kPanel * 2 + i % 2] = weight[row * k + i];
    }
}

void multiply_tile(const int16_t* gathered, int64_t rows, int64_t k, const int16_t* panels, int64_t channel,
                   int64_t channel_end, int64_t first, const Output& output) {
    const Dot dot = dot_kernel().run;
    const int64_t pairs = ceil_div(k, 2);
    alignas(64) int32_t acc[kTileRows * kPanel];
    for (; channel < channel_end; channel += kPanel, panels += pairs * kPanel * 2) {
        dot(gathered, panels, pairs, rows, acc);
        const int64_t count = smaller(kPanel, channel_end - channel);
        for (int64_t m = 0; m < rows; ++m) write_row(output, acc + m * kPanel, first + m, channel, count);
    }
}

int64_t panel_groups(int64_t tiles, int64_t panels) {
    const int64_t wanted = ceil_div(4 * max_threads(), larger(1, tiles));
    return smaller(panels, larger(1, wanted));
}

}  // namespace qdiff
