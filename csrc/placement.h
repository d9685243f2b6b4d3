// Where an input row lands in the output: nearest upsampling and border padding, written in the same pass.
#pragma once

#include "common.h"

namespace qdiff {

struct Placement {
    int64_t height, width, channels;  // of the input image
    int64_t upsample;
    int64_t top, bottom, left, right;  // in output pixels

    int64_t out_height() const { return height * upsample + top + bottom; }
    int64_t out_width() const { return width * upsample + left + right; }
    bool plain() const { return upsample == 1 && top + bottom + left + right == 0; }
};

// Writes input row y and everything it fills: its copies, its left and right border, and the border rows above
// the first row and below the last one. write(first_pixel, pixels, destination) produces the values.
template <class WritePixels>
void place_row(const Placement& place, char* image, int64_t y, int64_t element_size, uint8_t fill,
               WritePixels&& write) {
    const int64_t pixel = place.channels * element_size;
    const int64_t row = place.out_width() * pixel;
    char* out = image + (place.top + y * place.upsample) * row;
    char* inner = out + place.left * pixel;

    std::memset(out, fill, place.left * pixel);
    if (place.upsample == 1) {
        write(int64_t{0}, place.width, inner);
    } else {
        for (int64_t x = 0; x < place.width; ++x) {
            char* first = inner + x * place.upsample * pixel;
            write(x, int64_t{1}, first);
            for (int64_t copy = 1; copy < place.upsample; ++copy) std::memcpy(first + copy * pixel, first, pixel);
        }
    }
    std::memset(inner + place.width * place.upsample * pixel, fill, place.right * pixel);

    for (int64_t copy = 1; copy < place.upsample; ++copy) std::memcpy(out + copy * row, out, row);
    if (y == 0) std::memset(image, fill, place.top * row);
    if (y == place.height - 1) std::memset(out + place.upsample * row, fill, place.bottom * row);
}

}  // namespace qdiff
