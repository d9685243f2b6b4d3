// denoise_step: x' = cx x + c0 x0 + ce e' + sigma z + B, e' = a[c] e + b[c], e = uncond + g (cond - uncond).
#include "kernels.h"

namespace qdiff {
namespace {

// One image plane of one channel; the order of the additions is that of diffusers' schedulers.
template <Prediction kind>
QDIFF_INLINE void step_plane(const DenoiseStep& s, int64_t first, float a, float b, const float* bias) {
    const float* QDIFF_RESTRICT x = s.x + first;
    const float* QDIFF_RESTRICT cond = s.cond + first;
    const float* QDIFF_RESTRICT uncond = s.uncond == nullptr ? nullptr : s.uncond + first;
    const float* QDIFF_RESTRICT noise = s.noise == nullptr ? nullptr : s.noise + first;
    float* QDIFF_RESTRICT out = s.out + first;
    const bool mapped = s.bias_pixels > 1;
    const float constant = bias == nullptr || mapped ? 0.0f : bias[0];
    for (int64_t p = 0; p < s.pixels; ++p) {
        float e = cond[p];
        if (uncond != nullptr) e = uncond[p] + s.guidance * (e - uncond[p]);
        e = e * a + b;
        float y = s.cx * x[p];
        if (kind != Prediction::unclipped) {
            float sample = e;
            if (kind == Prediction::epsilon) {
                sample = (x[p] - s.deviation * e) / s.signal;
            } else if (kind == Prediction::v) {
                sample = s.signal * x[p] - s.deviation * e;
                e = s.signal * e + s.deviation * x[p];
            } else {
                e = (x[p] - s.signal * e) / s.deviation;
            }
            sample = sample > -s.clip ? sample : -s.clip;
            sample = sample < s.clip ? sample : s.clip;
            y = y + s.c0 * sample;
        }
        y = y + s.ce * e;
        if (noise != nullptr) y = y + s.sigma * noise[p];
        out[p] = y + (mapped ? bias[p] : constant);
    }
}

QDIFF_CLONES void step_unclipped(const DenoiseStep& s, int64_t first, float a, float b, const float* bias) {
    step_plane<Prediction::unclipped>(s, first, a, b, bias);
}
QDIFF_CLONES void step_epsilon(const DenoiseStep& s, int64_t first, float a, float b, const float* bias) {
    step_plane<Prediction::epsilon>(s, first, a, b, bias);
}
QDIFF_CLONES void step_v(const DenoiseStep& s, int64_t first, float a, float b, const float* bias) {
    step_plane<Prediction::v>(s, first, a, b, bias);
}
QDIFF_CLONES void step_sample(const DenoiseStep& s, int64_t first, float a, float b, const float* bias) {
    step_plane<Prediction::sample>(s, first, a, b, bias);
}

using Step = void (*)(const DenoiseStep&, int64_t, float, float, const float*);

Step step_of(Prediction prediction) {
    switch (prediction) {
        case Prediction::epsilon:
            return step_epsilon;
        case Prediction::v:
            return step_v;
        case Prediction::sample:
            return step_sample;
        default:
            return step_unclipped;
    }
}

}  // namespace

void denoise_step(const DenoiseStep& s) {
    const Step step = step_of(s.prediction);
    const int64_t planes = s.batch * s.channels;
#pragma omp parallel for schedule(static) if (planes * s.pixels >= kParallelElements)
    for (int64_t i = 0; i < planes; ++i) {
        const int64_t c = i % s.channels;
        step(s, i * s.pixels, s.a == nullptr ? 1.0f : s.a[c], s.b == nullptr ? 0.0f : s.b[c],
             s.input_bias == nullptr ? nullptr : s.input_bias + c * s.bias_pixels);
    }
}

}  // namespace qdiff
