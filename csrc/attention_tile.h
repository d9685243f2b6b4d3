// The attention of one head, included by attention.cpp once per instruction set: QDIFF_ATTEND marks its entry point.
//
// Vectorised over queries, so that a small head dimension costs nothing: 32 queries form one tile, their scores
// against a block of keys stay in the L1 cache, and the softmax is carried from block to block (online softmax).

typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t IntLanes __attribute__((vector_size(kLanes * sizeof(float))));

QDIFF_INLINE Lanes load(const float* x) {
    Lanes v;
    std::memcpy(&v, x, sizeof v);
    return v;
}

QDIFF_INLINE void store(float* x, Lanes v) { std::memcpy(x, &v, sizeof v); }

QDIFF_INLINE Lanes larger_of(Lanes a, Lanes b) { return a > b ? a : b; }

#ifdef QDIFF_EXP2_AVX512
// 2^x = 2^floor(x) times a polynomial in the fraction, for x <= 0; relative error 1.5e-7, 0 where 2^x is 0.
QDIFF_INLINE Lanes exp2_lanes(Lanes x) {
    const Lanes f = (Lanes)_mm512_reduce_ps((__m512)x, 0x09);  // x - floor(x)
    Lanes p = f * 1.877575010e-3f + 8.989344513e-3f;
    p = p * f + 5.582631382e-2f;
    p = p * f + 2.401536188e-1f;
    p = p * f + 6.931530729e-1f;
    p = p * f + 0.9999999251f;
    return (Lanes)_mm512_scalef_ps((__m512)p, (__m512)x);
}
#else
// 2^x for x in [-126, 0]: 2^n times a polynomial in the fraction, |fraction| <= 1/2; relative error 1.5e-7.
QDIFF_INLINE Lanes exp2_lanes(Lanes x) {
    x = larger_of(x, Lanes{} - 126.0f);
    const Lanes shifted = x + 12582912.0f;  // leaves the nearest integer in the low bits
    const Lanes f = x - (shifted - 12582912.0f);
    Lanes p = f * 1.327644437e-3f + 9.675537689e-3f;
    p = p * f + 5.550713315e-2f;
    p = p * f + 2.402211979e-1f;
    p = p * f + 6.931469671e-1f;
    p = p * f + 1.0f;
    return (Lanes)((IntLanes)p + ((IntLanes)shifted << 23));  // p lies in [0.7, 1.5]: n goes straight to its exponent
}
#endif

// scores[j][lane] = sum_c queries[c][lane] keys[j][c] for `count` keys; returns the running maximum.
template <int count>
QDIFF_INLINE void score_keys(const float* queries, const float* keys, int64_t dim, float* scores, Lanes maxima[2]) {
    Lanes s[count][2] = {};
    for (int64_t c = 0; c < dim; ++c) {
        const Lanes q0 = load(queries + c * kQueries), q1 = load(queries + c * kQueries + kLanes);
        for (int j = 0; j < count; ++j) {
            const float k = keys[j * dim + c];
            s[j][0] += q0 * k;
            s[j][1] += q1 * k;
        }
    }
    for (int j = 0; j < count; ++j)
        for (int half = 0; half < 2; ++half) {
            maxima[half] = larger_of(maxima[half], s[j][half]);
            store(scores + j * kQueries + half * kLanes, s[j][half]);
        }
}

// sums[c][lane] += sum_j weights[j][lane] values[j][c] for `count` channels c.
template <int count>
QDIFF_INLINE void add_values(const float* weights, const float* values, int64_t dim, int64_t keys, float* sums) {
    Lanes a[count][2] = {};  // a block's own sum first: long rows lose fewer digits
    for (int64_t j = 0; j < keys; ++j) {
        const Lanes w0 = load(weights + j * kQueries), w1 = load(weights + j * kQueries + kLanes);
        for (int c = 0; c < count; ++c) {
            const float v = values[j * dim + c];
            a[c][0] += w0 * v;
            a[c][1] += w1 * v;
        }
    }
    for (int c = 0; c < count; ++c)
        for (int half = 0; half < 2; ++half) {
            float* sum = sums + c * kQueries + half * kLanes;
            store(sum, load(sum) + a[c][half]);
        }
}

struct Scratch {
    float* queries;  // [dim][32], scaled by scale log2(e)
    float* sums;     // [dim][32]
    float* scores;   // [kKeys][32]
    float* keys;     // [keys][dim]: rows of one head, adjacent, lest they share a few sets of the cache
    float* values;   // [keys][dim]
};

// One block of keys: scores, the new maximum, the old sums rescaled to it, the weighted values added.
QDIFF_INLINE void attend_block(const Scratch& tile, const float* keys, const float* values, int64_t count, int64_t dim,
                               Lanes maxima[2], Lanes totals[2]) {
    const Lanes before[2] = {maxima[0], maxima[1]};
    int64_t j = 0;
    for (; j + 4 <= count; j += 4)
        score_keys<4>(tile.queries, keys + j * dim, dim, tile.scores + j * kQueries, maxima);
    for (; j < count; ++j)
        score_keys<1>(tile.queries, keys + j * dim, dim, tile.scores + j * kQueries, maxima);
    for (int half = 0; half < 2; ++half) {
        const Lanes rescale = exp2_lanes(before[half] - maxima[half]);
        totals[half] *= rescale;
        for (int64_t c = 0; c < dim; ++c) {
            float* sum = tile.sums + c * kQueries + half * kLanes;
            store(sum, load(sum) * rescale);
        }
        Lanes total = {};
        for (j = 0; j < count; ++j) {
            float* score = tile.scores + j * kQueries + half * kLanes;
            const Lanes weight = exp2_lanes(load(score) - maxima[half]);
            total += weight;
            store(score, weight);
        }
        totals[half] += total;
    }
    int64_t c = 0;
    for (; c + 4 <= dim; c += 4)
        add_values<4>(tile.scores, values + c, dim, count, tile.sums + c * kQueries);
    for (; c < dim; ++c) add_values<1>(tile.scores, values + c, dim, count, tile.sums + c * kQueries);
}

QDIFF_INLINE void gather_rows(const float* x, int64_t stride, int64_t rows, int64_t dim, float* out) {
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t c = 0; c < dim; ++c) out[row * dim + c] = x[row * stride + c];
}

QDIFF_INLINE void attend_tile(const AttentionShape& shape, const float* q, float* out, int64_t queries, int64_t dim,
                              const Scratch& tile) {
    for (int64_t c = 0; c < dim; ++c)
        for (int64_t lane = 0; lane < kQueries; ++lane)
            tile.queries[c * kQueries + lane] = lane < queries ? q[lane * shape.q_stride[2] + c] * shape.log2_scale : 0;
    std::memset(tile.sums, 0, dim * kQueries * sizeof(float));
    Lanes maxima[2] = {Lanes{} - 1e30f, Lanes{} - 1e30f}, totals[2] = {};
    for (int64_t start = 0; start < shape.keys; start += kKeys)
        attend_block(tile, tile.keys + start * dim, tile.values + start * dim, smaller(kKeys, shape.keys - start), dim,
                     maxima, totals);
    float inverse[kQueries];
    for (int half = 0; half < 2; ++half) store(inverse + half * kLanes, 1.0f / totals[half]);
    for (int64_t lane = 0; lane < queries; ++lane)
        for (int64_t c = 0; c < dim; ++c)
            out[lane * shape.heads * dim + c] = tile.sums[c * kQueries + lane] * inverse[lane];
}

QDIFF_INLINE void attend_rows(const AttentionShape& shape, const float* q, const float* k, const float* v, float* out,
                              int64_t first, int64_t queries, int64_t dim, const Scratch& scratch) {
    gather_rows(k, shape.k_stride[2], shape.keys, dim, scratch.keys);
    gather_rows(v, shape.v_stride[2], shape.keys, dim, scratch.values);
    for (int64_t row = first; row < first + queries; row += kQueries)
        attend_tile(shape, q + row * shape.q_stride[2], out + row * shape.heads * dim,
                    smaller(kQueries, first + queries - row), dim, scratch);
}

// Rows first .. first + queries of one head of one batch entry; the compiler unrolls the common head dimensions.
QDIFF_ATTEND
void attend(const AttentionShape& shape, const float* q, const float* k, const float* v, float* out, int64_t first,
            int64_t queries, const Scratch& scratch) {
    switch (shape.dim) {
        case 8: return attend_rows(shape, q, k, v, out, first, queries, 8, scratch);
        case 32: return attend_rows(shape, q, k, v, out, first, queries, 32, scratch);
        case 64: return attend_rows(shape, q, k, v, out, first, queries, 64, scratch);
        default: return attend_rows(shape, q, k, v, out, first, queries, shape.dim, scratch);
    }
}
