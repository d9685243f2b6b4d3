// Branch-free float32 functions that compilers vectorise: exp, erf, SiLU, GELU. Relative error about 1e-7.
#pragma once

#include "common.h"

namespace qdiff {

// exp(x) = 2^n exp(r), n = rint(x / ln 2), |r| <= ln 2 / 2, for x in [-87, 88].
QDIFF_INLINE float exp_bounded(float x) {
    const float shifted = multiply_add(x, 1.44269504f, 12582912.0f);
    const float n = shifted - 12582912.0f;
    // ln 2 in two parts: n times the first is exact
    const float r = multiply_add(n, 2.12194440e-4f, multiply_add(n, -0.693359375f, x));
    float p = multiply_add(1.9875691500e-4f, r, 1.3981999507e-3f);
    p = multiply_add(p, r, 8.3334519073e-3f);
    p = multiply_add(p, r, 4.1665795894e-2f);
    p = multiply_add(p, r, 1.6666665459e-1f);
    p = multiply_add(p, r, 5.0000001201e-1f);
    p = multiply_add(p, r * r, r) + 1.0f;
    int32_t bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    const int32_t exponent = (bits + 127) << 23;  // the shift drops the high bits of 12582912.0f
    float power;
    std::memcpy(&power, &exponent, sizeof power);
    return p * power;
}

QDIFF_INLINE float at_least(float x, float bound) { return x > bound ? x : bound; }
QDIFF_INLINE float at_most(float x, float bound) { return x < bound ? x : bound; }

// 2^x = 2^n 2^f, n = rint(x), |f| <= 1/2, for x in [-126, 126].
QDIFF_INLINE float exp2_bounded(float x) {
    const float shifted = x + 12582912.0f;
    const float f = x - (shifted - 12582912.0f);
    float p = multiply_add(f, 1.327644437e-3f, 9.675537689e-3f);
    p = multiply_add(p, f, 5.550713315e-2f);
    p = multiply_add(p, f, 2.402211979e-1f);
    p = multiply_add(p, f, 6.931469671e-1f);
    p = multiply_add(p, f, 1.0f);
    int32_t exponent, bits;
    std::memcpy(&exponent, &shifted, sizeof exponent);
    std::memcpy(&bits, &p, sizeof bits);
    bits += exponent << 23;  // p lies in [0.7, 1.5]: n goes straight to its exponent
    std::memcpy(&p, &bits, sizeof p);
    return p;
}

// erf(x): an odd polynomial below 0.93, 1 - exp(polynomial) above.
QDIFF_INLINE float erf_float(float x) {
    const float t = at_most(x < 0.0f ? -x : x, 4.0f);  // erf(4) is 1 in float32
    const float s = t * t;
    float small = multiply_add(-5.96761703e-4f, s, 4.99119423e-3f);
    small = multiply_add(small, s, -2.67681349e-2f);
    small = multiply_add(small, s, 1.12819925e-1f);
    small = multiply_add(small, s, -3.76125336e-1f);
    small = multiply_add(small, s, 1.28379166e-1f);
    small = multiply_add(small, t, t);
    float large = multiply_add(-1.72853470e-5f, t, 3.83197126e-4f);
    large = multiply_add(large, t, -3.88396438e-3f);
    large = multiply_add(large, t, 2.42546219e-2f);
    large = multiply_add(large, t, -1.06777877e-1f);
    large = multiply_add(large, t, -6.34846687e-1f);
    large = multiply_add(large, t, -1.28717512e-1f);
    large = 1.0f - exp_bounded(multiply_add(large, t, -t));
    const float magnitude = t > 0.927734375f ? large : small;
    return x < 0.0f ? -magnitude : magnitude;
}

// x / (1 + 2^t), t = -x log2(e): rounding t moves the quotient by less than 1e-7 max(1, |x|). Below -87 the quotient is 0
// in effect; the bound keeps huge values from dividing by a saturated exponential.
QDIFF_INLINE float silu_float(float x) {
    x = at_least(x, -87.0f);
    return x / (1.0f + exp2_bounded(at_least(x * -1.44269504f, -126.0f)));
}

// x (1 + erf(x / sqrt(2))) / 2
QDIFF_INLINE float gelu_float(float x) {
    const float half = 0.5f * x;
    return multiply_add(half, erf_float(x * 0.707106781f), half);
}

// x (1 + tanh(u)) / 2 = x / (1 + exp(-2u)), u = sqrt(2 / pi) (x + 0.044715 x^3)
QDIFF_INLINE float gelu_tanh_float(float x) {
    x = at_least(x, -12.0f);
    const float u = x * multiply_add(0.044715f * x, x, 1.0f);
    return x / (1.0f + exp_bounded(at_most(at_least(-1.59576912f * u, -87.0f), 87.0f)));
}

}  // namespace qdiff
