// The exact integer inner product that int_gemm and int_conv2d share: int16 pairs, int32 accumulators.
#pragma once

#include "kernels.h"

namespace qdiff {

constexpr int64_t kPanel = 32;     // output channels per weight panel
constexpr int64_t kTileRows = 48;  // output pixels per task

// int16 values per packed weight matrix of n rows and k columns, and per gathered activation row.
inline int64_t packed_size(int64_t n, int64_t k) { return ceil_div(n, kPanel) * kPanel * ceil_div(k, 2) * 2; }
inline int64_t gathered_size(int64_t k) { return ceil_div(k, 2) * 2; }

// weight int8 [n, k] -> panels int16 [ceil(n / 32), ceil(k / 2), 32, 2], missing values 0.
void pack_panels(const int8_t* weight, int16_t* panels, int64_t n, int64_t k);

// to[i] = q[i], or stored value - 128 for unsigned storage.
void widen(const uint8_t* q, bool unsigned_storage, int16_t* to, int64_t count);

// Multiplies rows [first, first + rows) gathered as int16 [rows, gathered_size(k)] with panels [0, panels) that hold
// output channels [channel, channel_end), and writes them through output.
void multiply_tile(const int16_t* gathered, int64_t rows, int64_t k, const int16_t* panels, int64_t channel,
                   int64_t channel_end, int64_t first, const Output& output);

// Which kernel multiplies here: "avx512", "avx2" or "default".
const char* dot_kernel_name();

// Into how many groups of panels a layer is cut so that every thread has work.
int64_t panel_groups(int64_t tiles, int64_t panels);

}  // namespace qdiff
