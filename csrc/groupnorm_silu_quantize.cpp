// groupnorm_silu_quantize: y = (x + pre_add - mean_g) / sqrt(var_g + eps) * weight + bias, y (1 + scale) + shift,
// SiLU, then q = quantise(y), with a factor per channel where equalised; x may come in two channel segments, and the output may be upsampled and padded. On the way
// x itself may be quantised too, for a shortcut that reads it beside the norm.
#include <cmath>
#include <vector>

#include "kernels.h"
#include "vector_math.h"
#ifdef QDIFF_HAS_AVX512
#include <immintrin.h>
#endif

namespace qdiff {
namespace {

constexpr int64_t kBlock = 16;   // pixels summed in float32 before the sums go to double
constexpr int64_t kChunk = 128;  // pixels per statistics task: fixed, so that no result depends on the thread count

// sum[c] += x[p, c] - shift[c] and squares[c] += (x[p, c] - shift[c])^2 over a block of pixels.
QDIFF_CLONES void accumulate_block(const float* QDIFF_RESTRICT x, int64_t pixels, int64_t channels,
                                   const float* QDIFF_RESTRICT shift, float* QDIFF_RESTRICT sum,
                                   float* QDIFF_RESTRICT squares) {
    int64_t p = 0;
    for (; p + 4 <= pixels; p += 4, x += 4 * channels) {
        const float *x1 = x + channels, *x2 = x1 + channels, *x3 = x2 + channels;
        for (int64_t c = 0; c < channels; ++c) {
            const float s = shift[c];
            const float a = x[c] - s, b = x1[c] - s, d = x2[c] - s, e = x3[c] - s;
            sum[c] += (a + b) + (d + e);
            squares[c] = multiply_add(a, a, multiply_add(b, b, multiply_add(d, d, multiply_add(e, e, squares[c]))));
        }
    }
    for (; p < pixels; ++p, x += channels) {
        for (int64_t c = 0; c < channels; ++c) {
            const float a = x[c] - shift[c];
            sum[c] += a;
            squares[c] += a * a;
        }
    }
}

QDIFF_CLONES void add_to_double(const float* QDIFF_RESTRICT part, double* QDIFF_RESTRICT total, int64_t count) {
    for (int64_t i = 0; i < count; ++i) total[i] += part[i];
}

// y = ((x + offset[c]) * factor[c] + constant[c]): subtracting before multiplying keeps a mean far above the
// deviation harmless; constant also holds what the rounding of offset lost.
struct Coefficients {
    float *offset, *factor, *constant;  // each [C]

    Coefficients from(int64_t channel) const { return {offset + channel, factor + channel, constant + channel}; }
};

template <bool silu, class Store>
QDIFF_INLINE void normalize_pixels(const float* QDIFF_RESTRICT x, int64_t pixels, int64_t channels,
                                   const Coefficients at, Store store) {
    const float *QDIFF_RESTRICT offset = at.offset, *QDIFF_RESTRICT factor = at.factor,
                                *QDIFF_RESTRICT constant = at.constant;
    for (int64_t p = 0; p < pixels; ++p, x += channels, store.next_pixel())
        for (int64_t c = 0; c < channels; ++c) {
            const float y = multiply_add(x[c] + offset[c], factor[c], constant[c]);
            store(c, silu ? silu_float(y) : y);
        }
}

struct StoreFloat {
    float* QDIFF_RESTRICT out;
    int64_t stride;
    QDIFF_INLINE void operator()(int64_t c, float y) const { out[c] = y; }
    QDIFF_INLINE void next_pixel() { out += stride; }
};

struct StoreInteger {
    uint8_t* QDIFF_RESTRICT out;
    int64_t stride;
    Quantizer quantizer;
    QDIFF_INLINE void operator()(int64_t c, float y) const { out[c] = quantize_value(y, quantizer.inverse, quantizer); }
    QDIFF_INLINE void next_pixel() { out += stride; }
};

// The same two with a factor per channel, which an equalised network's weights make good.
struct StoreScaledFloat {
    float* QDIFF_RESTRICT out;
    int64_t stride;
    const float* QDIFF_RESTRICT channel_inverse;
    QDIFF_INLINE void operator()(int64_t c, float y) const { out[c] = y * channel_inverse[c]; }
    QDIFF_INLINE void next_pixel() { out += stride; }
};

struct StoreScaledInteger {
    uint8_t* QDIFF_RESTRICT out;
    int64_t stride;
    Quantizer quantizer;
    const float* QDIFF_RESTRICT channel_inverse;
    QDIFF_INLINE void operator()(int64_t c, float y) const {
        out[c] = quantize_value(y, quantizer.inverse * channel_inverse[c], quantizer);
    }
    QDIFF_INLINE void next_pixel() { out += stride; }
};

#ifdef QDIFF_HAS_AVX512
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,fma")
namespace avx512 {

// silu(x) as x / (1 + 2^t): one instruction for the fraction of t, one for the power, and for the quotient an estimate
// and a Newton step instead of a division. x >= -87 keeps the power finite.
template <int count>
QDIFF_INLINE void silu_lanes(__m512 x[count]) {
    __m512 t[count], f[count], p[count];
    for (int i = 0; i < count; ++i) {
        x[i] = _mm512_max_ps(x[i], _mm512_set1_ps(-87.0f));
        t[i] = _mm512_mul_ps(x[i], _mm512_set1_ps(-1.44269504f));
        f[i] = _mm512_reduce_ps(t[i], 0x09);  // t - floor(t)
    }
    constexpr float coefficients[] = {8.989344513e-3f, 5.582631382e-2f, 2.401536188e-1f, 6.931530729e-1f, 0.9999999251f};
    for (int i = 0; i < count; ++i) p[i] = _mm512_set1_ps(1.877575010e-3f);
    for (const float coefficient : coefficients)
        for (int i = 0; i < count; ++i) p[i] = _mm512_fmadd_ps(p[i], f[i], _mm512_set1_ps(coefficient));
    const __m512 one = _mm512_set1_ps(1.0f);
    for (int i = 0; i < count; ++i) {
        const __m512 sum = _mm512_add_ps(_mm512_scalef_ps(p[i], t[i]), one);
        const __m512 guess = _mm512_rcp14_ps(sum);
        x[i] = _mm512_mul_ps(x[i], _mm512_fmadd_ps(guess, _mm512_fnmadd_ps(sum, guess, one), guess));
    }
}

// `count` vectors of one pixel's channels: normalise, SiLU, and store floats or, with a quantizer, integers.
template <int count, bool equalised>
QDIFF_INLINE void normalize_lanes(const float* x, const Coefficients& at, bool silu, __mmask16 lanes, char* to,
                                  const Quantizer* quantizer, const float* channel_inverse) {
    __m512 y[count];
    for (int i = 0; i < count; ++i) {
        const __m512 shifted = _mm512_add_ps(_mm512_maskz_loadu_ps(lanes, x + 16 * i),
                                             _mm512_maskz_loadu_ps(lanes, at.offset + 16 * i));
        y[i] = _mm512_fmadd_ps(shifted, _mm512_maskz_loadu_ps(lanes, at.factor + 16 * i),
                               _mm512_maskz_loadu_ps(lanes, at.constant + 16 * i));
    }
    if (silu) silu_lanes<count>(y);
    for (int i = 0; i < count; ++i) {
        if (!quantizer) {
            if (equalised) y[i] = _mm512_mul_ps(y[i], _mm512_maskz_loadu_ps(lanes, channel_inverse + 16 * i));
            _mm512_mask_storeu_ps(to + 64 * i, lanes, y[i]);
            continue;
        }
        __m512 inverse = _mm512_set1_ps(quantizer->inverse);
        if (equalised) inverse = _mm512_mul_ps(inverse, _mm512_maskz_loadu_ps(lanes, channel_inverse + 16 * i));
        __m512 v = _mm512_mul_ps(y[i], inverse);
        v = _mm512_min_ps(_mm512_max_ps(v, _mm512_set1_ps(quantizer->low)), _mm512_set1_ps(quantizer->high));
        const __m512i q = _mm512_add_epi32(_mm512_cvtps_epi32(v), _mm512_set1_epi32(quantizer->offset));
        _mm512_mask_cvtepi32_storeu_epi8(to + 16 * i, lanes, q);
    }
}

// Pixels of `channels` into rows of output `stride` bytes apart: floats, or integers with a quantizer.
template <bool equalised>
void normalize(const float* x, int64_t pixels, int64_t channels, const Coefficients& at, bool silu, char* to,
               int64_t stride, const Quantizer* quantizer, const float* channel_inverse) {
    const int64_t element = quantizer ? 1 : 4;
    for (int64_t p = 0; p < pixels; ++p, x += channels, to += stride) {
        int64_t c = 0;
        for (; c + 64 <= channels; c += 64)
            normalize_lanes<4, equalised>(x + c, at.from(c), silu, 0xFFFF, to + c * element, quantizer,
                                          equalised ? channel_inverse + c : nullptr);
        for (; c < channels; c += 16) {
            const __mmask16 lanes = channels - c < 16 ? (1u << (channels - c)) - 1 : 0xFFFF;
            normalize_lanes<1, equalised>(x + c, at.from(c), silu, lanes, to + c * element, quantizer,
                                          equalised ? channel_inverse + c : nullptr);
        }
    }
}

}  // namespace avx512
#pragma GCC pop_options
#endif

QDIFF_CLONES void normalize_to_float(const float* x, int64_t pixels, int64_t channels, const Coefficients& at,
                                     bool silu, float* out, int64_t stride) {
    if (silu) return normalize_pixels<true>(x, pixels, channels, at, StoreFloat{out, stride});
    normalize_pixels<false>(x, pixels, channels, at, StoreFloat{out, stride});
}

QDIFF_CLONES void normalize_to_integer(const float* x, int64_t pixels, int64_t channels, const Coefficients& at,
                                       bool silu, uint8_t* out, int64_t stride, const Quantizer& quantizer) {
    if (silu) return normalize_pixels<true>(x, pixels, channels, at, StoreInteger{out, stride, quantizer});
    normalize_pixels<false>(x, pixels, channels, at, StoreInteger{out, stride, quantizer});
}

QDIFF_CLONES void normalize_to_scaled_float(const float* x, int64_t pixels, int64_t channels, const Coefficients& at,
                                            bool silu, float* out, int64_t stride, const float* channel_inverse) {
    const StoreScaledFloat store{out, stride, channel_inverse};
    if (silu) return normalize_pixels<true>(x, pixels, channels, at, store);
    normalize_pixels<false>(x, pixels, channels, at, store);
}

QDIFF_CLONES void normalize_to_scaled_integer(const float* x, int64_t pixels, int64_t channels, const Coefficients& at,
                                              bool silu, uint8_t* out, int64_t stride, const Quantizer& quantizer,
                                              const float* channel_inverse) {
    const StoreScaledInteger store{out, stride, quantizer, channel_inverse};
    if (silu) return normalize_pixels<true>(x, pixels, channels, at, store);
    normalize_pixels<false>(x, pixels, channels, at, store);
}

// Floats, or integers with a quantizer; channel_inverse is of these channels, or null.
void normalize(const float* x, int64_t pixels, int64_t channels, const Coefficients& at, bool silu, char* to,
               int64_t stride, const Quantizer* quantizer, const float* channel_inverse) {
#ifdef QDIFF_HAS_AVX512
    if (has_avx512()) {
        const auto run = channel_inverse ? avx512::normalize<true> : avx512::normalize<false>;
        return run(x, pixels, channels, at, silu, to, stride, quantizer, channel_inverse);
    }
#endif
    if (channel_inverse) {
        if (!quantizer)
            return normalize_to_scaled_float(x, pixels, channels, at, silu, reinterpret_cast<float*>(to), stride / 4,
                                             channel_inverse);
        return normalize_to_scaled_integer(x, pixels, channels, at, silu, reinterpret_cast<uint8_t*>(to), stride,
                                           *quantizer, channel_inverse);
    }
    if (!quantizer)
        return normalize_to_float(x, pixels, channels, at, silu, reinterpret_cast<float*>(to), stride / 4);
    normalize_to_integer(x, pixels, channels, at, silu, reinterpret_cast<uint8_t*>(to), stride, *quantizer);
}

QDIFF_CLONES void copy_to_integer(const float* QDIFF_RESTRICT x, int64_t count, uint8_t* QDIFF_RESTRICT out,
                                  const Quantizer& q) {
    for (int64_t i = 0; i < count; ++i) out[i] = quantize_value(x[i], q.inverse, q);
}

// shift[c]: the mean of the sample's first block, close enough to the mean that squares around it do not cancel.
void block_mean(const GroupNorm& norm, int64_t n, float* shift, float* unused) {
    const int64_t count = smaller(kBlock, norm.pixels()), channels = norm.channels();
    float* zero = unused + channels;
    std::memset(shift, 0, channels * sizeof(float));
    std::memset(unused, 0, 2 * channels * sizeof(float));
    accumulate_block(norm.x + n * norm.pixels() * norm.c1, count, norm.c1, zero, shift, unused);
    if (norm.c2) accumulate_block(norm.x2 + n * norm.pixels() * norm.c2, count, norm.c2, zero, shift + norm.c1, unused);
    for (int64_t c = 0; c < channels; ++c) shift[c] /= static_cast<float>(count);
}

// totals [2 C]: sums and sums of squares around shift over one chunk of pixels. work: float [2 C].
void chunk_sums(const GroupNorm& norm, int64_t n, int64_t chunk, const float* shift, double* totals, float* work) {
    const int64_t channels = norm.channels(), last = smaller((chunk + 1) * kChunk, norm.pixels());
    std::memset(totals, 0, 2 * channels * sizeof(double));
    for (int64_t p = chunk * kChunk; p < last; p += kBlock) {
        const int64_t count = smaller(kBlock, last - p), pixel = n * norm.pixels() + p;
        float *sum = work, *squares = work + channels;
        std::memset(work, 0, 2 * channels * sizeof(float));
        accumulate_block(norm.x + pixel * norm.c1, count, norm.c1, shift, sum, squares);
        if (norm.c2)
            accumulate_block(norm.x2 + pixel * norm.c2, count, norm.c2, shift + norm.c1, sum + norm.c1,
                             squares + norm.c1);
        add_to_double(work, totals, 2 * channels);
    }
}

void add_sums(const GroupNorm& norm, const double* part, double* totals) {
    for (int64_t i = 0; i < 2 * norm.channels(); ++i) totals[i] += part[i];
}

// Group statistics from channel sums, and from them one affine map per channel.
void coefficients_of(const GroupNorm& norm, int64_t n, const float* shift, const double* totals, Coefficients out) {
    const int64_t channels = norm.channels(), size = channels / norm.groups;
    const double count = static_cast<double>(norm.pixels());
    const double *sum = totals, *squares = totals + channels;
    const float* pre_add = norm.pre_add ? norm.pre_add + n * channels : nullptr;
    const auto mean_of = [&](int64_t c) { return shift[c] + sum[c] / count + (pre_add ? pre_add[c] : 0.0f); };
    for (int64_t first = 0; first < channels; first += size) {
        double mean = 0.0, deviation = 0.0;
        for (int64_t c = first; c < first + size; ++c) mean += mean_of(c);
        mean /= size;
        for (int64_t c = first; c < first + size; ++c) {
            const double within = squares[c] - sum[c] * sum[c] / count, between = mean_of(c) - mean;
            deviation += (within > 0.0 ? within : 0.0) + count * between * between;
        }
        const double inverse = 1.0 / std::sqrt(deviation / (count * size) + norm.eps);
        for (int64_t c = first; c < first + size; ++c) {
            const double scale = norm.norm_scale ? 1.0 + norm.norm_scale[n * channels + c] : 1.0;
            const double factor = inverse * (norm.weight ? norm.weight[c] : 1.0f) * scale;
            const double offset = (pre_add ? pre_add[c] : 0.0f) - mean;
            out.offset[c] = static_cast<float>(offset);
            out.factor[c] = static_cast<float>(factor);
            out.constant[c] =
                static_cast<float>((offset - out.offset[c]) * factor + (norm.bias ? norm.bias[c] : 0.0f) * scale +
                                   (norm.norm_shift ? norm.norm_shift[n * channels + c] : 0.0f));
        }
    }
}

// Normalises pixels [first, first + count) of sample n into consecutive output pixels.
void write_pixels(const GroupNorm& norm, int64_t n, int64_t first, int64_t count, const Coefficients& at, char* to) {
    const int64_t pixel = n * norm.pixels() + first, channels = norm.channels();
    const float* segments[2] = {norm.x + pixel * norm.c1, norm.x2 ? norm.x2 + pixel * norm.c2 : nullptr};
    const int64_t sizes[2] = {norm.c1, norm.c2};
    const int64_t element = norm.float_out ? 4 : 1;
    const float* inverse = norm.quantizer.channel_inverse;
    for (int64_t i = 0, channel = 0; i < 2 && sizes[i]; channel += sizes[i++]) {
        normalize(segments[i], count, sizes[i], at.from(channel), norm.silu, to + channel * element, channels * element,
                  norm.float_out ? nullptr : &norm.quantizer, inverse ? inverse + channel : nullptr);
        const QuantizedCopy& copy = norm.copies[i];
        if (copy.out) copy_to_integer(segments[i], count * sizes[i], copy.out + pixel * sizes[i], copy.quantizer);
    }
}

int64_t write_tasks(const GroupNorm& norm) {
    return norm.place.plain() ? ceil_div(norm.pixels(), kChunk) : norm.place.height;
}

// One chunk of pixels, or one image row where the output is upsampled or padded.
void write_task(const GroupNorm& norm, int64_t n, int64_t task, const Coefficients& at) {
    const int64_t element = norm.float_out ? 4 : 1, pixel = norm.channels() * element;
    char* image =
        (norm.float_out ? reinterpret_cast<char*>(norm.float_out) : reinterpret_cast<char*>(norm.integer_out)) +
        n * norm.place.out_height() * norm.place.out_width() * pixel;
    if (norm.place.plain()) {
        const int64_t first = task * kChunk;
        write_pixels(norm, n, first, smaller(kChunk, norm.pixels() - first), at, image + first * pixel);
        return;
    }
    place_row(norm.place, image, task, element, norm.float_out ? 0 : norm.quantizer.zero_byte(),
              [&](int64_t first, int64_t count, char* to) {
                  write_pixels(norm, n, task * norm.place.width + first, count, at, to);
              });
}

// Per sample: the statistics' centre and the affine map. Per thread: two blocks of float sums and a row of zeros.
class Workspace {
public:
    Workspace(const GroupNorm& norm, int threads, int64_t sums)
        : channels_(norm.channels()),
          batch_(norm.batch),
          floats_(static_cast<size_t>((norm.batch * 4 + threads * 3) * channels_)),
          doubles_(static_cast<size_t>(sums * 2 * channels_)) {}

    float* shift(int64_t n) { return floats_.data() + n * 4 * channels_; }
    Coefficients at(int64_t n) {
        float* first = shift(n) + channels_;
        return {first, first + channels_, first + 2 * channels_};
    }
    float* block() { return floats_.data() + (batch_ * 4 + thread_index() * 3) * channels_; }
    double* sums(int64_t i) { return doubles_.data() + i * 2 * channels_; }

private:
    int64_t channels_, batch_;
    std::vector<float> floats_;
    std::vector<double> doubles_;
};

// Whole samples per thread: a sample stays in its thread's cache between the two passes over it.
void by_sample(const GroupNorm& norm, int threads) {
    const int64_t chunks = ceil_div(norm.pixels(), kChunk), tasks = write_tasks(norm);
    Workspace work(norm, threads, 2 * threads);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t n = 0; n < norm.batch; ++n) {
        double *totals = work.sums(2 * thread_index()), *part = work.sums(2 * thread_index() + 1);
        block_mean(norm, n, work.shift(n), work.block());
        chunk_sums(norm, n, 0, work.shift(n), totals, work.block());
        for (int64_t chunk = 1; chunk < chunks; ++chunk) {
            chunk_sums(norm, n, chunk, work.shift(n), part, work.block());
            add_sums(norm, part, totals);
        }
        coefficients_of(norm, n, work.shift(n), totals, work.at(n));
        for (int64_t task = 0; task < tasks; ++task) write_task(norm, n, task, work.at(n));
    }
}

// Few samples: their chunks are shared out, and the same sums are added in the same order.
void by_chunk(const GroupNorm& norm, int threads) {
    const int64_t chunks = ceil_div(norm.pixels(), kChunk), tasks = write_tasks(norm);
    Workspace work(norm, threads, norm.batch * chunks);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t n = 0; n < norm.batch; ++n) block_mean(norm, n, work.shift(n), work.block());
#pragma omp for schedule(static)
        for (int64_t i = 0; i < norm.batch * chunks; ++i)
            chunk_sums(norm, i / chunks, i % chunks, work.shift(i / chunks), work.sums(i), work.block());
#pragma omp for schedule(static)
        for (int64_t n = 0; n < norm.batch; ++n) {
            double* totals = work.sums(n * chunks);
            for (int64_t chunk = 1; chunk < chunks; ++chunk) add_sums(norm, work.sums(n * chunks + chunk), totals);
            coefficients_of(norm, n, work.shift(n), totals, work.at(n));
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < norm.batch * tasks; ++i) write_task(norm, i / tasks, i % tasks, work.at(i / tasks));
    }
}

}  // namespace

void groupnorm_silu_quantize(const GroupNorm& norm) {
    const int threads = norm.batch * norm.pixels() * norm.channels() >= kParallelElements ? max_threads() : 1;
    if (norm.batch % threads == 0 || norm.batch >= 4 * threads) return by_sample(norm, threads);
    by_chunk(norm, threads);
}

}  // namespace qdiff
