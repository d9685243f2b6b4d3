// quantize: q = clamp(rint(f(x) * inv) + z), f one of none, SiLU, GELU, tanh GELU, GEGLU.
#include "kernels.h"
#include "vector_math.h"

namespace qdiff {
namespace {

template <Activation kind>
QDIFF_INLINE float activate(float x) {
    if (kind == Activation::silu) return silu_float(x);
    if (kind == Activation::gelu) return gelu_float(x);
    if (kind == Activation::gelu_tanh) return gelu_tanh_float(x);
    return x;
}

template <Activation kind>
QDIFF_INLINE void quantize_pixels(const float* QDIFF_RESTRICT x, uint8_t* QDIFF_RESTRICT out, int64_t pixels,
                                  int64_t channels, const Quantizer q) {
    if (q.channel_inverse == nullptr) {
        for (int64_t i = 0; i < pixels * channels; ++i) out[i] = quantize_value(activate<kind>(x[i]), q.inverse, q);
        return;
    }
    const float* QDIFF_RESTRICT channel_inverse = q.channel_inverse;
    for (int64_t p = 0; p < pixels; ++p, x += channels, out += channels)
        for (int64_t c = 0; c < channels; ++c)
            out[c] = quantize_value(activate<kind>(x[c]), q.inverse * channel_inverse[c], q);
}

QDIFF_INLINE void quantize_geglu(const float* QDIFF_RESTRICT x, uint8_t* QDIFF_RESTRICT out, int64_t pixels,
                                 int64_t channels, const Quantizer q) {
    const float* QDIFF_RESTRICT channel_inverse = q.channel_inverse;
    for (int64_t p = 0; p < pixels; ++p, x += 2 * channels, out += channels) {
        const float* QDIFF_RESTRICT gate = x + channels;
        if (channel_inverse == nullptr) {
            for (int64_t c = 0; c < channels; ++c) out[c] = quantize_value(x[c] * gelu_float(gate[c]), q.inverse, q);
        } else {
            for (int64_t c = 0; c < channels; ++c)
                out[c] = quantize_value(x[c] * gelu_float(gate[c]), q.inverse * channel_inverse[c], q);
        }
    }
}

// One clone per activation: a clone that switches inside would lose vectorisation of its largest branch.
QDIFF_CLONES void run_none(const float* x, uint8_t* out, int64_t pixels, int64_t channels, const Quantizer& q) {
    quantize_pixels<Activation::none>(x, out, pixels, channels, q);
}
QDIFF_CLONES void run_silu(const float* x, uint8_t* out, int64_t pixels, int64_t channels, const Quantizer& q) {
    quantize_pixels<Activation::silu>(x, out, pixels, channels, q);
}
QDIFF_CLONES void run_gelu(const float* x, uint8_t* out, int64_t pixels, int64_t channels, const Quantizer& q) {
    quantize_pixels<Activation::gelu>(x, out, pixels, channels, q);
}
QDIFF_CLONES void run_gelu_tanh(const float* x, uint8_t* out, int64_t pixels, int64_t channels, const Quantizer& q) {
    quantize_pixels<Activation::gelu_tanh>(x, out, pixels, channels, q);
}
QDIFF_CLONES void run_geglu(const float* x, uint8_t* out, int64_t pixels, int64_t channels, const Quantizer& q) {
    quantize_geglu(x, out, pixels, channels, q);
}

using Run = void (*)(const float*, uint8_t*, int64_t, int64_t, const Quantizer&);

Run run_of(Activation activation) {
    switch (activation) {
        case Activation::silu:
            return run_silu;
        case Activation::gelu:
            return run_gelu;
        case Activation::gelu_tanh:
            return run_gelu_tanh;
        case Activation::geglu:
            return run_geglu;
        default:
            return run_none;
    }
}

}  // namespace

void quantize(const float* x, uint8_t* out, int64_t batch, const Placement& place, Activation activation,
              const Quantizer& q) {
    const Run run = run_of(activation);
    const int64_t channels = place.channels;
    const int64_t in_channels = activation == Activation::geglu ? 2 * channels : channels;
    const int64_t pixels = batch * place.height * place.width;

    if (place.plain()) {
        const int64_t chunk = larger(1, kParallelElements / larger(1, channels));
        const int64_t chunks = ceil_div(pixels, chunk);
#pragma omp parallel for schedule(static) if (pixels * channels >= kParallelElements)
        for (int64_t i = 0; i < chunks; ++i) {
            const int64_t first = i * chunk;
            run(x + first * in_channels, out + first * channels, smaller(chunk, pixels - first), channels, q);
        }
        return;
    }

    const int64_t image_size = place.out_height() * place.out_width() * channels;
#pragma omp parallel for schedule(static) if (pixels * channels >= kParallelElements)
    for (int64_t row = 0; row < batch * place.height; ++row) {
        const int64_t n = row / place.height, y = row % place.height;
        const float* row_x = x + row * place.width * in_channels;
        place_row(place, reinterpret_cast<char*>(out + n * image_size), y, 1, q.zero_byte(),
                  [&](int64_t first, int64_t count, char* to) {
                      run(row_x + first * in_channels, reinterpret_cast<uint8_t*>(to), count, channels, q);
                  });
    }
}

}  // namespace qdiff
