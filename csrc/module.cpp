// The Python module qdiff_engine._C: pointers as integers (0 is null), sizes, no tensors. It checks sizes only;
// qdiff_engine/ops/native.py checks tensors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>

#include "int_dot.h"

namespace py = pybind11;
using namespace qdiff;

namespace {

using Address = uintptr_t;
using Padding = std::array<int64_t, 4>;  // top, bottom, left, right

template <class T>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

void require(bool condition, const char* what) {
    if (!condition) throw std::invalid_argument(std::string("qdiff_engine._C: ") + what);
}

Placement placement(int64_t height, int64_t width, int64_t channels, int64_t upsample, const Padding& padding) {
    require(height >= 0 && width >= 0 && channels >= 0, "sizes must not be negative");
    require(upsample >= 1, "upsample must be at least 1");
    for (int64_t side : padding) require(side >= 0, "padding must not be negative");
    return {height, width, channels, upsample, padding[0], padding[1], padding[2], padding[3]};
}

Quantizer quantizer(double scale, Address channel_inverse, int zero_point, int bits, bool unsigned_storage) {
    require(bits == 4 || bits == 8, "bits must be 4 or 8");
    require(scale > 0.0, "scale must be positive");
    const int low = -(1 << (bits - 1)), high = -low - 1;
    require(zero_point >= low && zero_point <= high, "zero_point is out of the range of bits");
    return make_quantizer(scale, pointer<const float>(channel_inverse), zero_point, low, high, unsigned_storage);
}

void bind_quantize(Address x, Address out, int64_t batch, int64_t height, int64_t width, int64_t channels, double scale,
                   int zero_point, int bits, Address channel_inverse, int activation, int64_t upsample,
                   const Padding& padding, bool unsigned_storage) {
    require(activation >= 0 && activation <= 4, "activation must be 0..4");
    require(batch >= 0, "sizes must not be negative");
    const Placement place = placement(height, width, channels, upsample, padding);
    const Quantizer q = quantizer(scale, channel_inverse, zero_point, bits, unsigned_storage);
    py::gil_scoped_release release;
    quantize(pointer<const float>(x), pointer<uint8_t>(out), batch, place, static_cast<Activation>(activation), q);
}

using Copy = std::tuple<Address, double, int, int>;  // output or null, scale, zero point, bits

void bind_groupnorm(Address x, Address x2, int64_t batch, int64_t height, int64_t width, int64_t c1, int64_t c2,
                    int64_t groups, double eps, Address pre_add, Address weight, Address bias, Address norm_scale,
                    Address norm_shift, bool silu, Address float_out, Address integer_out, double scale,
                    Address channel_inverse, int zero_point, int bits, int64_t upsample, const Padding& padding,
                    bool unsigned_storage, const std::array<Copy, 2>& copies) {
    require(batch >= 0 && c1 > 0 && c2 >= 0, "sizes must be positive");
    require(groups > 0 && (c1 + c2) % groups == 0, "groups must divide the channels");
    require((float_out == 0) != (integer_out == 0), "exactly one output is needed");
    require((x2 == 0) == (c2 == 0), "x2 and c2 must come together");
    GroupNorm norm{};
    norm.x = pointer<const float>(x);
    norm.x2 = pointer<const float>(x2);
    norm.batch = batch;
    norm.c1 = c1;
    norm.c2 = c2;
    norm.groups = groups;
    norm.eps = eps;
    norm.pre_add = pointer<const float>(pre_add);
    norm.weight = pointer<const float>(weight);
    norm.bias = pointer<const float>(bias);
    norm.norm_scale = pointer<const float>(norm_scale);
    norm.norm_shift = pointer<const float>(norm_shift);
    norm.silu = silu;
    norm.place = placement(height, width, c1 + c2, upsample, padding);
    norm.float_out = pointer<float>(float_out);
    norm.integer_out = pointer<uint8_t>(integer_out);
    norm.quantizer = quantizer(scale, channel_inverse, zero_point, bits, unsigned_storage);
    for (int i = 0; i < 2; ++i) {
        const auto& [to, copy_scale, copy_zero_point, copy_bits] = copies[i];
        require(to == 0 || i == 0 || c2 > 0, "a copy of x2 needs x2");
        if (to)
            norm.copies[i] = {pointer<uint8_t>(to), quantizer(copy_scale, 0, copy_zero_point, copy_bits, unsigned_storage)};
    }
    py::gil_scoped_release release;
    groupnorm_silu_quantize(norm);
}

using Strides = std::array<int64_t, 3>;

void bind_attention(Address q, Address k, Address v, Address float_out, const Copy& integers, int64_t batch, int64_t heads, int64_t queries,
                    int64_t keys, int64_t dim, const Strides& q_stride, const Strides& k_stride,
                    const Strides& v_stride, double scale, bool unsigned_storage) {
    require(batch > 0 && heads > 0 && queries > 0 && keys > 0 && dim > 0, "sizes must be positive");
    const float log2_scale = static_cast<float>(scale * 1.4426950408889634);
    const auto& [integer_out, out_scale, zero_point, bits] = integers;
    require((float_out == 0) != (integer_out == 0), "exactly one output is needed");
    const AttentionOutput out = {pointer<float>(float_out), pointer<uint8_t>(integer_out),
                                 quantizer(out_scale, 0, zero_point, bits, unsigned_storage)};
    py::gil_scoped_release release;
    attention(pointer<const float>(q), pointer<const float>(k), pointer<const float>(v), out,
              {batch, heads, queries, keys, dim, q_stride, k_stride, v_stride, log2_scale});
}

void bind_layernorm(Address x, int64_t rows, int64_t features, Address weight, Address bias, double eps,
                    Address float_out, Address integer_out, double scale, int zero_point, int bits,
                    bool unsigned_storage) {
    require(rows >= 0 && features > 0, "sizes must be positive");
    require((float_out == 0) != (integer_out == 0), "exactly one output is needed");
    const Quantizer q = quantizer(scale, 0, zero_point, bits, unsigned_storage);
    py::gil_scoped_release release;
    layernorm_quantize(pointer<const float>(x), rows, features, pointer<const float>(weight),
                       pointer<const float>(bias), eps, pointer<float>(float_out), pointer<uint8_t>(integer_out), q);
}

// epilogue: (zero_point, scale, weight_scale, weight_sums, class_index, bias, temb, residual)
using Epilogue = std::tuple<int32_t, double, Address, Address, Address, Address, Address, Address>;

Output output_map(Address out, bool accumulators, int64_t pixels, int64_t channels, const Epilogue& e) {
    Output output{};
    output.accumulators = accumulators ? pointer<int32_t>(out) : nullptr;
    output.y = accumulators ? nullptr : pointer<float>(out);
    output.zero_point = std::get<0>(e);
    output.scale = static_cast<float>(std::get<1>(e));
    output.weight_scale = pointer<const float>(std::get<2>(e));
    output.weight_sums = pointer<const int32_t>(std::get<3>(e));
    output.class_index = pointer<const int32_t>(std::get<4>(e));
    output.bias = pointer<const float>(std::get<5>(e));
    output.temb = pointer<const float>(std::get<6>(e));
    output.residual = pointer<const float>(std::get<7>(e));
    output.pixels = pixels;
    output.channels = channels;
    return output;
}

void bind_gemm(Address q, bool unsigned_storage, Address panels, int64_t rows, int64_t features, int64_t channels,
               Address out, bool accumulators, const Epilogue& epilogue) {
    require(rows >= 0 && features > 0 && channels > 0, "sizes must be positive");
    const Output output = output_map(out, accumulators, larger(1, rows), channels, epilogue);
    py::gil_scoped_release release;
    int_gemm(pointer<const uint8_t>(q), unsigned_storage, pointer<const int16_t>(panels), rows, features, output);
}

// image (B, H, W, Cin), weight (Cout, groups, R, S), geometry (stride h, w, top, left, dilation h, w), result (OH, OW)
void bind_conv2d(Address q, bool unsigned_storage, Address panels, const std::array<int64_t, 4>& image,
                 const std::array<int64_t, 4>& weight, const std::array<int64_t, 6>& geometry,
                 const std::array<int64_t, 2>& result, Address out, bool accumulators, const Epilogue& epilogue) {
    const Convolution conv{image[0],    image[1],    image[2],    image[3],    weight[0],   weight[1],
                           weight[2],   weight[3],   geometry[0], geometry[1], geometry[2], geometry[3],
                           geometry[4], geometry[5], result[0],   result[1]};
    require(conv.groups > 0 && conv.in_channels % conv.groups == 0 && conv.out_channels % conv.groups == 0,
            "groups must divide the channels");
    require(conv.stride_h > 0 && conv.stride_w > 0 && conv.dilation_h > 0 && conv.dilation_w > 0,
            "stride and dilation must be positive");
    require(conv.out_height > 0 && conv.out_width > 0, "the output is empty");
    const Output output = output_map(out, accumulators, conv.out_height * conv.out_width, conv.out_channels, epilogue);
    py::gil_scoped_release release;
    int_conv2d(pointer<const uint8_t>(q), unsigned_storage, pointer<const int16_t>(panels), conv, output);
}

void bind_denoise_step(const std::array<Address, 8>& tensors, const std::array<int64_t, 4>& shape, int prediction,
                       const std::array<float, 8>& constants) {
    require(prediction >= 0 && prediction <= 3, "prediction must be 0 to 3");
    require(shape[0] >= 0 && shape[1] > 0 && shape[2] >= 0, "sizes must not be negative");
    require(shape[3] == 1 || shape[3] == shape[2], "the bias must have one value per channel or per element");
    DenoiseStep step{};
    step.x = pointer<const float>(tensors[0]);
    step.cond = pointer<const float>(tensors[1]);
    step.uncond = pointer<const float>(tensors[2]);
    step.noise = pointer<const float>(tensors[3]);
    step.a = pointer<const float>(tensors[4]);
    step.b = pointer<const float>(tensors[5]);
    step.input_bias = pointer<const float>(tensors[6]);
    step.out = pointer<float>(tensors[7]);
    step.batch = shape[0], step.channels = shape[1], step.pixels = shape[2], step.bias_pixels = shape[3];
    step.prediction = static_cast<Prediction>(prediction);
    step.cx = constants[0], step.c0 = constants[1], step.ce = constants[2], step.sigma = constants[3];
    step.signal = constants[4], step.deviation = constants[5], step.clip = constants[6], step.guidance = constants[7];
    py::gil_scoped_release release;
    denoise_step(step);
}

void bind_pack_panels(Address weight, Address panels, int64_t groups, int64_t n, int64_t k) {
    require(groups > 0 && n > 0 && k > 0, "sizes must be positive");
    py::gil_scoped_release release;
    for (int64_t g = 0; g < groups; ++g)
        pack_panels(pointer<const int8_t>(weight) + g * n * k, pointer<int16_t>(panels) + g * packed_size(n, k), n, k);
}

void bind_histogram(Address x, int64_t count, int64_t bins, double low, double high, Address counts) {
    require(count >= 0 && bins > 0 && high > low, "bins must be positive and high above low");
    py::gil_scoped_release release;
    histogram(pointer<const float>(x), count, bins, low, high, pointer<int64_t>(counts));
}

py::tuple bind_min_max(Address x, int64_t count) {
    require(count > 0, "an empty tensor has no range");
    MinMax range;
    {
        py::gil_scoped_release release;
        range = min_max(pointer<const float>(x), count);
    }
    return py::make_tuple(range.low, range.high, range.finite);
}

py::dict bind_cpu_features() {
    const CpuFeatures features = cpu_features();
    py::dict result;
    result["avx2"] = features.avx2;
    result["avx512"] = features.avx512;
    result["avx512_vnni"] = features.avx512_vnni;
    result["avx_vnni"] = features.avx_vnni;
    result["amx_int8"] = features.amx_int8;
    result["dotprod"] = features.dotprod;
    return result;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "CPU kernels of qdiff-engine over raw pointers; call them through qdiff_engine.ops.native";
    m.def("quantize", bind_quantize);
    m.def("groupnorm_silu_quantize", bind_groupnorm);
    m.def("attention", bind_attention);
    m.def("layernorm_quantize", bind_layernorm);
    m.def("denoise_step", bind_denoise_step);
    m.def("int_gemm", bind_gemm);
    m.def("int_conv2d", bind_conv2d);
    m.def("pack_panels", bind_pack_panels);
    m.def("packed_size", packed_size);
    m.def("histogram", bind_histogram);
    m.def("min_max", bind_min_max);
    m.def("cpu_features", bind_cpu_features);
    m.def("dot_kernel", dot_kernel_name);
    m.def("keep_freed_memory", keep_freed_memory);
    m.def("max_threads", max_threads);
#ifdef _OPENMP
    m.attr("openmp") = true;
#else
    m.attr("openmp") = false;
#endif
}
