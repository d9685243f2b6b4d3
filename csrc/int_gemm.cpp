// int_gemm: acc[m, n] = sum over k of q[m, k] w[n, k], then the output map of kernels.h.
#include <vector>

#include "int_dot.h"

namespace qdiff {

void int_gemm(const uint8_t* q, bool unsigned_storage, const int16_t* panels, int64_t rows, int64_t features,
              const Output& output) {
    const int64_t tiles = ceil_div(rows, kTileRows), all_panels = ceil_div(output.channels, kPanel);
    const int64_t parts = panel_groups(tiles, all_panels), part_panels = ceil_div(all_panels, parts);
    const int64_t width = gathered_size(features), panel_size = packed_size(kPanel, features);
    const int threads = rows * features * output.channels >= 64 * kParallelElements ? max_threads() : 1;
    std::vector<int16_t> buffers(static_cast<size_t>(threads) * kTileRows * width, 0);

#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t task = 0; task < tiles * parts; ++task) {
        const int64_t first = task / parts * kTileRows, panel = task % parts * part_panels;
        const int64_t count = smaller(kTileRows, rows - first);
        const int64_t end = smaller(output.channels, (panel + part_panels) * kPanel);
        int16_t* gathered = buffers.data() + thread_index() * kTileRows * width;
        for (int64_t m = 0; m < count; ++m)
            widen(q + (first + m) * features, unsigned_storage, gathered + m * width, features);
        multiply_tile(gathered, count, features, panels + panel * panel_size, panel * kPanel, end, first, output);
    }
}

}  // namespace qdiff
