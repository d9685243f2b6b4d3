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
// 2^x = 2^floor(x) times a polynomial in the fraction, for x <= 126; relative error 1.5e-7, 0 where 2^x is 0.
QDIFF_INLINE Lanes exp2_lanes(Lanes x) {
    const Lanes f = (Lanes)_mm512_reduce_ps((__m512)x, 0x09);  // x - floor(x)
    Lanes p = f * 1.877575010e-3f + 8.989344513e-3f;
    p = p * f + 5.582631382e-2f;
    p = p * f + 2.401536188e-1f;
    p = p * f + 6.931530729e-1f;
    p = p * f + 0.9999999251f;
    return (Lanes)_mm512_scalef_ps((__m512)p, (__m512)x);
}

QDIFF_INLINE Lanes exp2_bounded(Lanes x) { return exp2_lanes(x); }
#else
// 2^x for x in [-126, 126]: 2^n times a polynomial in the fraction, |fraction| <= 1/2; relative error 1.5e-7.
QDIFF_INLINE Lanes exp2_bounded(Lanes x) {
    const Lanes shifted = x + 12582912.0f;  // leaves the nearest integer in the low bits
    const Lanes f = x - (shifted - 12582912.0f);
    Lanes p = f * 1.327644437e-3f + 9.675537689e-3f;
    p = p * f + 5.550713315e-2f;
    p = p * f + 2.402211979e-1f;
    p = p * f + 6.931469671e-1f;
    p = p * f + 1.0f;
    return (Lanes)((IntLanes)p + ((IntLanes)shifted << 23));  // p lies in [0.7, 1.5]: n goes straight to its exponent
}

QDIFF_INLINE Lanes exp2_lanes(Lanes x) { return exp2_bounded(larger_of(x, Lanes{} - 126.0f)); }
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

// `count` keys for scores of magnitude at most kBound, whose powers of two neither overflow nor vanish: without a
// maximum no score waits in memory, and so many keys at once are as many independent chains of multiply-adds.
template <int dim, int count>
QDIFF_INLINE void attend_keys(const float* queries, const float* keys, const float* values, Lanes sums[dim],
                              Lanes& total) {
    Lanes s[count] = {};
#pragma GCC unroll 8  // fully, or s would live in memory
    for (int c = 0; c < dim; ++c) {
        const Lanes q = load(queries + c * kQueries);
        for (int j = 0; j < count; ++j) s[j] += q * keys[j * dim + c];
    }
    for (int j = 0; j < count; ++j) {
        s[j] = exp2_bounded(s[j]);
        total += s[j];
    }
#pragma GCC unroll 8
    for (int j = 0; j < count; ++j)
        for (int c = 0; c < dim; ++c) sums[c] += s[j] * values[j * dim + c];
}

// All keys of a head of `dim` channels, see attend_keys.
template <int dim>
QDIFF_INLINE void attend_bounded(const Scratch& tile, int64_t keys, Lanes totals[2]) {
    for (int half = 0; half < 2; ++half) {
        const float* queries = tile.queries + half * kLanes;
        for (int64_t start = 0; start < keys; start += kKeys) {
            const int64_t end = smaller(start + kKeys, keys);
            Lanes sums[dim] = {}, total = {};  // a block's own sum first: long rows lose fewer digits
            int64_t j = start;
            for (; j + 4 <= end; j += 4)
                attend_keys<dim, 4>(queries, tile.keys + j * dim, tile.values + j * dim, sums, total);
            for (; j < end; ++j)
                attend_keys<dim, 1>(queries, tile.keys + j * dim, tile.values + j * dim, sums, total);
            totals[half] += total;
            for (int c = 0; c < dim; ++c) {
                float* sum = tile.sums + c * kQueries + half * kLanes;
                store(sum, load(sum) + sums[c]);
            }
        }
    }
}

// max over rows of the squared length of x [rows][dim], its elements `stride` and its rows `row_stride` apart.
QDIFF_INLINE float longest(const float* x, int64_t rows, int64_t row_stride, int64_t dim, int64_t stride) {
    float most = 0.0f;
    for (int64_t row = 0; row < rows; ++row) {
        float length = 0.0f;
        for (int64_t c = 0; c < dim; ++c) length += x[row * row_stride + c * stride] * x[row * row_stride + c * stride];
        most = length > most ? length : most;
    }
    return most;
}

QDIFF_INLINE void attend_tile(const AttentionShape& shape, const float* q, const AttentionOutput& out, int64_t offset,
                              int64_t queries, int64_t dim, const Scratch& tile, float longest_key) {
    for (int64_t c = 0; c < dim; ++c)
        for (int64_t lane = 0; lane < kQueries; ++lane)
            tile.queries[c * kQueries + lane] = lane < queries ? q[lane * shape.q_stride[2] + c] * shape.log2_scale : 0;
    std::memset(tile.sums, 0, dim * kQueries * sizeof(float));
    Lanes maxima[2] = {Lanes{} - 1e30f, Lanes{} - 1e30f}, totals[2] = {};
    if (dim == kSmallHead && longest(tile.queries, kQueries, 1, dim, kQueries) * longest_key <= kBound * kBound) {
        attend_bounded<kSmallHead>(tile, shape.keys, totals);
    } else {
        for (int64_t start = 0; start < shape.keys; start += kKeys)
            attend_block(tile, tile.keys + start * dim, tile.values + start * dim, smaller(kKeys, shape.keys - start),
                         dim, maxima, totals);
    }
    float inverse[kQueries];
    for (int half = 0; half < 2; ++half) store(inverse + half * kLanes, 1.0f / totals[half]);
    for (int64_t lane = 0; lane < queries; ++lane, offset += shape.heads * dim)
        for (int64_t c = 0; c < dim; ++c) {
            const float y = tile.sums[c * kQueries + lane] * inverse[lane];
            if (out.integers) {
                out.integers[offset + c] = quantize_value(y, out.quantizer.inverse, out.quantizer);
            } else {
                out.floats[offset + c] = y;
            }
        }
}

QDIFF_INLINE void attend_rows(const AttentionShape& shape, const float* q, const float* k, const float* v,
                              const AttentionOutput& out, int64_t offset, int64_t first, int64_t queries, int64_t dim,
                              const Scratch& scratch) {
    gather_rows(k, shape.k_stride[2], shape.keys, dim, scratch.keys);
    gather_rows(v, shape.v_stride[2], shape.keys, dim, scratch.values);
    const float longest_key = dim == kSmallHead ? longest(scratch.keys, shape.keys, dim, dim, 1) : 0.0f;
    for (int64_t row = first; row < first + queries; row += kQueries)
        attend_tile(shape, q + row * shape.q_stride[2], out, offset + row * shape.heads * dim,
                    smaller(kQueries, first + queries - row), dim, scratch, longest_key);
}

// Rows first .. first + queries of one head of one batch entry, whose row 0 starts at `offset`; the compiler unrolls the common head dimensions.
QDIFF_ATTEND
void attend(const AttentionShape& shape, const float* q, const float* k, const float* v,
            const AttentionOutput& out, int64_t offset, int64_t first, int64_t queries, const Scratch& scratch) {
    switch (shape.dim) {
        case kSmallHead: return attend_rows(shape, q, k, v, out, offset, first, queries, kSmallHead, scratch);
        case 32: return attend_rows(shape, q, k, v, out, offset, first, queries, 32, scratch);
        case 64: return attend_rows(shape, q, k, v, out, offset, first, queries, 64, scratch);
        default: return attend_rows(shape, q, k, v, out, offset, first, queries, shape.dim, scratch);
    }
}
