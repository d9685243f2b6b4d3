// layernorm_quantize: y = (x - mean) / sqrt(var + eps) * weight + bias over the last axis, then q = quantise(y).
#include <cmath>

#include "kernels.h"

namespace qdiff {
namespace {

// sum over k < count of term(k), in 32 lanes: the same order of additions on every instruction set.
template <class Term>
QDIFF_INLINE float sum(int64_t count, const Term term) {
    constexpr int64_t kLanes = 32;
    float lanes[kLanes] = {};
    int64_t k = 0;
    for (; k + kLanes <= count; k += kLanes)
        for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] += term(k + lane);
    for (int64_t lane = 0; k + lane < count; ++lane) lanes[lane] += term(k + lane);
    for (int64_t half = kLanes / 2; half > 0; half /= 2)
        for (int64_t lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
    return lanes[0];
}

struct Value {
    const float* QDIFF_RESTRICT x;
    QDIFF_INLINE float operator()(int64_t k) const { return x[k]; }
};

struct Deviation {
    const float* QDIFF_RESTRICT x;
    float mean;
    QDIFF_INLINE float operator()(int64_t k) const { return x[k] - mean; }
};

struct SquaredDeviation {
    const float* QDIFF_RESTRICT x;
    float mean;
    QDIFF_INLINE float operator()(int64_t k) const { return (x[k] - mean) * (x[k] - mean); }
};

struct Row {
    float mean, rest;  // mean + rest is the mean to twice float precision: a mean far above the deviation stays exact
    float inverse_deviation;
};

// The row stays in the L1 cache; the later passes also correct the rounding of the mean.
QDIFF_INLINE Row row_statistics(const float* x, int64_t features, double eps) {
    const float mean = sum(features, Value{x}) / static_cast<float>(features);
    const double correction = static_cast<double>(sum(features, Deviation{x, mean})) / features;
    const double square = static_cast<double>(sum(features, SquaredDeviation{x, mean})) / features;
    const double variance = square > correction * correction ? square - correction * correction : 0.0;
    return {mean, static_cast<float>(correction), static_cast<float>(1.0 / std::sqrt(variance + eps))};
}

template <bool has_weight, bool has_bias, class Store>
QDIFF_INLINE void normalize_row(const float* QDIFF_RESTRICT x, int64_t features, const float* QDIFF_RESTRICT weight,
                                const float* QDIFF_RESTRICT bias, const Row row, const Store store) {
    for (int64_t k = 0; k < features; ++k) {
        float y = ((x[k] - row.mean) - row.rest) * row.inverse_deviation;
        if (has_weight) y *= weight[k];
        if (has_bias) y += bias[k];
        store(k, y);
    }
}

template <class Store>
QDIFF_INLINE void normalize(const float* x, int64_t features, const float* weight, const float* bias, double eps,
                            const Store store) {
    const Row row = row_statistics(x, features, eps);
    if (weight && bias) return normalize_row<true, true>(x, features, weight, bias, row, store);
    if (weight) return normalize_row<true, false>(x, features, weight, bias, row, store);
    if (bias) return normalize_row<false, true>(x, features, weight, bias, row, store);
    normalize_row<false, false>(x, features, weight, bias, row, store);
}

struct StoreFloat {
    float* QDIFF_RESTRICT out;
    QDIFF_INLINE void operator()(int64_t k, float y) const { out[k] = y; }
};

struct StoreInteger {
    uint8_t* QDIFF_RESTRICT out;
    Quantizer quantizer;
    QDIFF_INLINE void operator()(int64_t k, float y) const { out[k] = quantize_value(y, quantizer.inverse, quantizer); }
};

QDIFF_CLONES void row_to_float(const float* x, int64_t features, const float* weight, const float* bias, double eps,
                               float* out) {
    normalize(x, features, weight, bias, eps, StoreFloat{out});
}

QDIFF_CLONES void row_to_integer(const float* x, int64_t features, const float* weight, const float* bias, double eps,
                                 uint8_t* out, const Quantizer& quantizer) {
    normalize(x, features, weight, bias, eps, StoreInteger{out, quantizer});
}

}  // namespace

void layernorm_quantize(const float* x, int64_t rows, int64_t features, const float* weight, const float* bias,
                        double eps, float* float_out, uint8_t* integer_out, const Quantizer& quantizer) {
#pragma omp parallel for schedule(static) if (rows * features >= kParallelElements)
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t first = row * features;
        if (float_out) {
            row_to_float(x + first, features, weight, bias, eps, float_out + first);
        } else {
            row_to_integer(x + first, features, weight, bias, eps, integer_out + first, quantizer);
        }
    }
}

}  // namespace qdiff
