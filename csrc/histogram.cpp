// histogram: counts[clamp(floor((x - low) * bins / (high - low)), 0, bins - 1)] += 1; and the range of a tensor.
#include <limits>
#include <vector>

#include "kernels.h"

namespace qdiff {
namespace {

constexpr int64_t kBlock = 4096;

QDIFF_CLONES void bin_indices(const float* QDIFF_RESTRICT x, int32_t* QDIFF_RESTRICT index, int64_t count, double low,
                              double factor, double last) {
    const int32_t last_index = static_cast<int32_t>(last);
    for (int64_t i = 0; i < count; ++i) {
        double bin = (static_cast<double>(x[i]) - low) * factor;
        bin = bin > 0.0 ? bin : 0.0;
        bin = bin < last ? bin : last;
        const int32_t rounded = static_cast<int32_t>(bin);  // clamped again: a NaN must not leave the table
        index[i] = rounded < 0 ? 0 : (rounded > last_index ? last_index : rounded);
    }
}

// Values are non-finite where the exponent bits are all ones.
QDIFF_CLONES MinMax min_max_block(const float* QDIFF_RESTRICT x, int64_t count) {
    float low = std::numeric_limits<float>::max(), high = -low;
    uint32_t largest = 0;
#pragma omp simd reduction(min : low) reduction(max : high, largest)
    for (int64_t i = 0; i < count; ++i) {
        uint32_t bits;
        std::memcpy(&bits, &x[i], sizeof bits);
        bits &= 0x7f800000u;
        low = x[i] < low ? x[i] : low;
        high = x[i] > high ? x[i] : high;
        largest = bits > largest ? bits : largest;
    }
    return {low, high, largest != 0x7f800000u};
}

}  // namespace

void histogram(const float* x, int64_t count, int64_t bins, double low, double high, int64_t* counts) {
    const int threads = count >= kParallelElements ? max_threads() : 1;
    const int64_t copies = 2;  // neighbouring values often share a bin: two tables break the store-to-load chain
    std::vector<int64_t> tables(static_cast<size_t>(threads) * copies * bins, 0);
    std::vector<int32_t> indices(static_cast<size_t>(threads) * kBlock);
    const double factor = static_cast<double>(bins) / (high - low), last = static_cast<double>(bins - 1);

#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t block = 0; block < ceil_div(count, kBlock); ++block) {
        int64_t* even = tables.data() + thread_index() * copies * bins;
        int64_t* odd = even + bins;
        int32_t* index = indices.data() + thread_index() * kBlock;
        const int64_t size = smaller(kBlock, count - block * kBlock);
        bin_indices(x + block * kBlock, index, size, low, factor, last);
        for (int64_t i = 0; i + 1 < size; i += 2) {
            ++even[index[i]];
            ++odd[index[i + 1]];
        }
        if (size % 2) ++even[index[size - 1]];
    }

    for (int64_t bin = 0; bin < bins; ++bin) {
        counts[bin] = 0;
        for (int64_t table = 0; table < threads * copies; ++table) counts[bin] += tables[table * bins + bin];
    }
}

MinMax min_max(const float* x, int64_t count) {
    float low = std::numeric_limits<float>::max(), high = -low;
    bool finite = true;
#pragma omp parallel for schedule(static) reduction(min : low) reduction(max : high) \
    reduction(&& : finite) if (count >= kParallelElements)
    for (int64_t block = 0; block < ceil_div(count, kBlock); ++block) {
        const MinMax part = min_max_block(x + block * kBlock, smaller(kBlock, count - block * kBlock));
        low = part.low < low ? part.low : low;
        high = part.high > high ? part.high : high;
        finite = finite && part.finite;
    }
    return {low, high, finite};
}

}  // namespace qdiff
