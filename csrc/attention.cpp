// attention: out[l] = sum_s softmax_s(scale q[l] . k[s]) v[s], for every batch entry and head, float32 or quantised.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("fp-contract=fast")  // no rounding here is specified bit for bit: multiply-adds may fuse
#endif
#include <vector>

#include "kernels.h"

#if defined(__GNUC__)
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors never leave this file
#endif
#ifdef QDIFF_HAS_AVX512
#include <immintrin.h>
#endif

namespace qdiff {
namespace {

#if defined(__clang__)
#pragma clang fp contract(fast)
#endif

constexpr int64_t kLanes = 16, kQueries = 2 * kLanes, kKeys = 128;
constexpr int64_t kSmallHead = 8;  // the head dimension of diffusers' unconditional UNets
constexpr float kBound = 64.0f;    // of a score, as a power of two: no sum of exponentials overflows below it
constexpr int64_t kTaskQueries = 8 * kQueries;  // share one copy of the keys

namespace portable {
#define QDIFF_ATTEND QDIFF_CLONES
#include "attention_tile.h"
#undef QDIFF_ATTEND
}  // namespace portable

#ifdef QDIFF_HAS_AVX512
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,fma")
namespace avx512 {
#define QDIFF_ATTEND
#define QDIFF_EXP2_AVX512
#include "attention_tile.h"
}  // namespace avx512
#pragma GCC pop_options
#endif

using portable::Scratch;

void attend_head(const AttentionShape& shape, const float* q, const float* k, const float* v,
                 const AttentionOutput& out, int64_t offset, int64_t first, int64_t queries, const Scratch& s) {
#ifdef QDIFF_HAS_AVX512
    if (has_avx512()) {
        avx512::attend(shape, q, k, v, out, offset, first, queries,
                       {s.queries, s.sums, s.scores, s.keys, s.values});
        return;
    }
#endif
    portable::attend(shape, q, k, v, out, offset, first, queries, s);
}

}  // namespace

void attention(const float* q, const float* k, const float* v, const AttentionOutput& out, const AttentionShape& shape) {
    const int64_t parts = ceil_div(shape.queries, kTaskQueries), tasks = shape.batch * shape.heads * parts;
#pragma omp parallel if (tasks > 1)
    {
        const int64_t rows = shape.dim * kQueries, all_keys = shape.dim * shape.keys;
        std::vector<float> memory(2 * rows + kKeys * kQueries + 2 * all_keys);
        float* at = memory.data();
        const Scratch scratch = {at, at + rows, at + 2 * rows, at + 2 * rows + kKeys * kQueries,
                                 at + 2 * rows + kKeys * kQueries + all_keys};
#pragma omp for schedule(static)
        for (int64_t task = 0; task < tasks; ++task) {
            const int64_t b = task / parts / shape.heads, h = task / parts % shape.heads;
            const int64_t first = task % parts * kTaskQueries;
            attend_head(shape, q + b * shape.q_stride[0] + h * shape.q_stride[1],
                   k + b * shape.k_stride[0] + h * shape.k_stride[1], v + b * shape.v_stride[0] + h * shape.v_stride[1],
                   out, (b * shape.queries * shape.heads + h) * shape.dim, first,
                   smaller(kTaskQueries, shape.queries - first), scratch);
        }
    }
}

}  // namespace qdiff
