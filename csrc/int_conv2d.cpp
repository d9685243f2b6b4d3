// int_conv2d: acc[b, i, j, n] = sum over r, s, c of q[b, i stride + r dilation - top, j ..., c] w[n, r, s, c], then the
// output map of kernels.h. Taps outside the image add 0; the border classes carry the zero point.
#include <vector>

#include "int_dot.h"

namespace qdiff {
namespace {

// One output pixel's taps of one group of channels, in the order (r, s, channel): to [R S Cin / groups].
void gather(const uint8_t* q, bool unsigned_storage, const Convolution& conv, int64_t row, int64_t group, int16_t* to) {
    const int64_t channels = conv.in_channels / conv.groups, pixels = conv.out_height * conv.out_width;
    const int64_t b = row / pixels, i = row % pixels / conv.out_width, j = row % conv.out_width;
    const uint8_t* image = q + b * conv.height * conv.width * conv.in_channels + group * channels;
    for (int64_t r = 0; r < conv.kernel_h; ++r) {
        const int64_t y = i * conv.stride_h + r * conv.dilation_h - conv.top;
        const bool inside = y >= 0 && y < conv.height;
        for (int64_t s = 0; s < conv.kernel_w; ++s, to += channels) {
            const int64_t x = j * conv.stride_w + s * conv.dilation_w - conv.left;
            if (inside && x >= 0 && x < conv.width) {
                widen(image + (y * conv.width + x) * conv.in_channels, unsigned_storage, to, channels);
            } else {
                std::memset(to, 0, channels * sizeof(int16_t));
            }
        }
    }
}

}  // namespace

void int_conv2d(const uint8_t* q, bool unsigned_storage, const int16_t* panels, const Convolution& conv,
                const Output& output) {
    const int64_t rows = conv.batch * conv.out_height * conv.out_width, tiles = ceil_div(rows, kTileRows);
    const int64_t taps = conv.kernel_h * conv.kernel_w * (conv.in_channels / conv.groups);
    const int64_t channels = conv.out_channels / conv.groups, all_panels = ceil_div(channels, kPanel);
    const int64_t parts = panel_groups(tiles * conv.groups, all_panels), part_panels = ceil_div(all_panels, parts);
    const int64_t width = gathered_size(taps), panel_size = packed_size(kPanel, taps);
    const int threads = rows * taps * conv.out_channels >= 64 * kParallelElements ? max_threads() : 1;
    std::vector<int16_t> buffers(static_cast<size_t>(threads) * kTileRows * width, 0);

#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t task = 0; task < tiles * conv.groups * parts; ++task) {
        const int64_t first = task / (conv.groups * parts) * kTileRows, group = task / parts % conv.groups;
        const int64_t panel = task % parts * part_panels, count = smaller(kTileRows, rows - first);
        const int64_t begin = group * channels + panel * kPanel;
        const int64_t end = group * channels + smaller(channels, (panel + part_panels) * kPanel);
        int16_t* gathered = buffers.data() + thread_index() * kTileRows * width;
        for (int64_t m = 0; m < count; ++m) gather(q, unsigned_storage, conv, first + m, group, gathered + m * width);
        multiply_tile(gathered, count, taps, panels + (group * all_panels + panel) * panel_size, begin, end, first,
                      output);
    }
}

}  // namespace qdiff
