// add: y[n, p, c] += temb[n, c] + residual[n, p, c], in place.
#include "kernels.h"

namespace qdiff {
namespace {

QDIFF_CLONES void add_pixels(float* QDIFF_RESTRICT y, const float* QDIFF_RESTRICT residual,
                             const float* QDIFF_RESTRICT temb, int64_t pixels, int64_t channels) {
    if (temb == nullptr) {
        for (int64_t i = 0; i < pixels * channels; ++i) y[i] += residual[i];
        return;
    }
    for (int64_t p = 0; p < pixels; ++p, y += channels) {
        if (residual == nullptr) {
            for (int64_t c = 0; c < channels; ++c) y[c] += temb[c];
        } else {
            for (int64_t c = 0; c < channels; ++c) y[c] = (y[c] + temb[c]) + residual[c];
            residual += channels;
        }
    }
}

}  // namespace

void add(float* y, int64_t batch, int64_t pixels, int64_t channels, const float* residual, const float* temb) {
    if (residual == nullptr && temb == nullptr) return;
    const int64_t chunk = larger(1, kParallelElements / larger(1, channels));
    const int64_t chunks = ceil_div(pixels, chunk);
#pragma omp parallel for schedule(static) if (batch * pixels * channels >= kParallelElements)
    for (int64_t i = 0; i < batch * chunks; ++i) {
        const int64_t n = i / chunks, first = i % chunks * chunk;
        const int64_t offset = (n * pixels + first) * channels;
        add_pixels(y + offset, residual ? residual + offset : nullptr, temb ? temb + n * channels : nullptr,
                   smaller(chunk, pixels - first), channels);
    }
}

}  // namespace qdiff
