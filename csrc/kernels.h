// The operators, one .cpp file each. Activations are NHWC, floats are float32, pointers may be null where it says so.
#pragma once

#include <array>

#include "common.h"
#include "placement.h"

namespace qdiff {

enum class Activation : int { none = 0, silu = 1, gelu = 2, gelu_tanh = 3, geglu = 4 };

void quantize(const float* x, uint8_t* out, int64_t batch, const Placement& place, Activation activation,
              const Quantizer& quantizer);

// A segment of x quantised on its own while it is in the cache anyway; none where out is null.
struct QuantizedCopy {
    uint8_t* out;  // [N, H W, c]
    Quantizer quantizer;
};

struct GroupNorm {
    const float* x;   // [N, H W, c1]
    const float* x2;  // [N, H W, c2] or null: further channels
    int64_t batch, c1, c2, groups;
    double eps;
    const float* pre_add;     // [N, C] or null, added to x before the statistics
    const float* weight;      // [C] or null
    const float* bias;        // [C] or null
    const float* norm_scale;  // [N, C] or null: y * (1 + scale) + shift
    const float* norm_shift;  // [N, C] or null
    bool silu;
    Placement place;
    float* float_out;      // [N, OH, OW, C], or null:
    uint8_t* integer_out;  // [N, OH, OW, C]
    Quantizer quantizer;   // its channel factors multiply a float result, too
    QuantizedCopy copies[2];  // of x and of x2

    int64_t channels() const { return c1 + c2; }
    int64_t pixels() const { return place.height * place.width; }
};
void groupnorm_silu_quantize(const GroupNorm& norm);

// Exactly one of float_out and integer_out is given.
void layernorm_quantize(const float* x, int64_t rows, int64_t features, const float* weight, const float* bias,
                        double eps, float* float_out, uint8_t* integer_out, const Quantizer& quantizer);

// What the network predicts, where the sampler clips the sample that follows from it; else it is used as it is.
enum class Prediction : int { unclipped = 0, epsilon = 1, v = 2, sample = 3 };

struct DenoiseStep {
    const float* x;           // [N, C, P]
    const float* cond;        // [N, C, P]
    const float* uncond;      // [N, C, P] or null
    const float* noise;       // [N, C, P] or null
    const float* a;           // [C] or null
    const float* b;           // [C] or null
    const float* input_bias;  // [C, bias_pixels] or null
    float* out;               // [N, C, P]
    int64_t batch, channels, pixels;
    int64_t bias_pixels;  // P, or 1 where B is one value per channel
    Prediction prediction;
    float cx, c0, ce, sigma, signal, deviation, clip, guidance;
};
void denoise_step(const DenoiseStep& step);

// What an int32 accumulator becomes: y = (acc - z wsum[class, n]) (s s_w[n]) + bias[n] + temb[b, n] + residual[m, n].
struct Output {
    int32_t* accumulators;  // [M, N] raw, or null:
    float* y;               // [M, N]
    float scale;
    int32_t zero_point;
    const float* weight_scale;   // [N]
    const int32_t* weight_sums;  // [classes, N]
    const int32_t* class_index;  // [pixels] or null: all of class 0
    const float* bias;           // [N] or null
    const float* temb;           // [B, N] or null
    const float* residual;       // [M, N] or null
    int64_t pixels;              // rows per image: b = m / pixels, class = class_index[m % pixels]
    int64_t channels;            // N
};

// q [M, K] int8 or uint8 (q + 128); panels from pack_panels.
void int_gemm(const uint8_t* q, bool unsigned_storage, const int16_t* panels, int64_t rows, int64_t features,
              const Output& output);

struct Convolution {
    int64_t batch, height, width, in_channels;  // q [B, H, W, Cin]
    int64_t out_channels, groups, kernel_h, kernel_w;
    int64_t stride_h, stride_w, top, left, dilation_h, dilation_w;
    int64_t out_height, out_width;
};
// panels [groups][...] from pack_panels, one group after the other, K in the order (r, s, cin).
void int_conv2d(const uint8_t* q, bool unsigned_storage, const int16_t* panels, const Convolution& conv,
                const Output& output);

void histogram(const float* x, int64_t count, int64_t bins, double low, double high, int64_t* counts);

struct MinMax {
    float low, high;
    bool finite;
};
MinMax min_max(const float* x, int64_t count);

struct CpuFeatures {
    bool avx2, avx512, avx512_vnni, avx_vnni, amx_int8, dotprod;
};
CpuFeatures cpu_features();

// Tells glibc to reuse freed memory instead of handing it back to the kernel; false where there is no glibc.
bool keep_freed_memory();

struct AttentionShape {
    int64_t batch, heads, queries, keys, dim;
    std::array<int64_t, 3> q_stride, k_stride, v_stride;  // elements per batch entry, head, row; channels are adjacent
    float log2_scale;                                     // scale times log2(e): the softmax works with powers of two
};
struct AttentionOutput {  // [batch, queries, heads, dim], contiguous; integers where they are given, else floats
    float* floats;
    uint8_t* integers;
    Quantizer quantizer;
};
void attention(const float* q, const float* k, const float* v, const AttentionOutput& out, const AttentionShape& shape);

}  // namespace qdiff
