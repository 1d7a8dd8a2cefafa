// The operators that rsa_kernels/cuda.py calls: they check what they are given, and launch on the current stream.
//
// LibTorch's stable ABI alone, so that one build serves later versions of torch, and every Python from 3.10 on.
#if !defined(Py_LIMITED_API)
#define Py_LIMITED_API 0x030a0000
#endif
#include <Python.h>
// Python.h comes first.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <initializer_list>
#include <optional>

#include "launch.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Guard = torch::stable::accelerator::DeviceGuard;

// Dims of a packed volume (N, D, H, W, C).
constexpr int64_t volume_dims = 5;

rsa::Number number_of(const Tensor& volume, bool tf32, const char* name) {
  switch (volume.scalar_type()) {
    case ScalarType::BFloat16:
      return rsa::Number::bfloat16;
    case ScalarType::Half:
      return rsa::Number::float16;
    case ScalarType::Float:
      return tf32 ? rsa::Number::tf32 : rsa::Number::float32;
    case ScalarType::Double:
      return rsa::Number::float64;
    default:
      STD_TORCH_CHECK(false, name, " must be of dtype bfloat16, float16, float32 or float64");
  }
}

ScalarType sum_type(ScalarType type) { return type == ScalarType::Double ? type : ScalarType::Float; }

int64_t padded(int64_t slices) { return (slices + rsa::map_padding - 1) / rsa::map_padding * rsa::map_padding; }

// Checks a dense tensor of known dtype and sizes.
void check(const Tensor& tensor, const char* name, const Tensor& like, ScalarType type,
           std::initializer_list<int64_t> sizes) {
  STD_TORCH_CHECK(tensor.is_cuda(), name, " must be on a GPU");
  STD_TORCH_CHECK(tensor.get_device_index() == like.get_device_index(), name, " is on another GPU");
  STD_TORCH_CHECK(tensor.scalar_type() == type, name, " has the wrong dtype");
  STD_TORCH_CHECK(tensor.dim() == static_cast<int64_t>(sizes.size()), name, " has ", tensor.dim(),
                  " dims, but must have ", sizes.size());
  int64_t dim = 0;
  for (const int64_t size : sizes) {
    STD_TORCH_CHECK(tensor.size(dim) == size, name, " has size ", tensor.size(dim), " in dim ", dim, ", but must have ",
                    size);
    ++dim;
  }
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
}

// Checks a volume (N, D, H, W, C) whose voxels lie at equal distances.
rsa::Volume volume_of(const Tensor& tensor, const char* name, const Tensor& like) {
  STD_TORCH_CHECK(tensor.is_cuda(), name, " must be on a GPU");
  STD_TORCH_CHECK(tensor.get_device_index() == like.get_device_index(), name, " is on another GPU");
  STD_TORCH_CHECK(tensor.scalar_type() == like.scalar_type(), name, " has another dtype");
  STD_TORCH_CHECK(tensor.dim() == volume_dims, name, " has ", tensor.dim(), " dims, but must be (N, D, H, W, C)");
  for (int64_t dim = 0; dim < volume_dims; ++dim) {
    STD_TORCH_CHECK(tensor.size(dim) > 0, name, " is empty");
    STD_TORCH_CHECK(tensor.size(dim) == like.size(dim), name, " has size ", tensor.size(dim), " in dim ", dim,
                    ", but must have ", like.size(dim));
  }
  const int64_t channels = tensor.size(4);
  STD_TORCH_CHECK(channels == 1 || tensor.stride(4) == 1, name, " must have its channels side by side");
  int64_t row = 0, voxels = 1;
  for (int64_t dim = 3; dim >= 0; --dim) {
    if (tensor.size(dim) == 1) continue;
    if (row == 0) row = tensor.stride(dim);
    STD_TORCH_CHECK(tensor.stride(dim) == row * voxels, name, " must have its voxels at equal distances");
    voxels *= tensor.size(dim);
  }
  if (row == 0) row = channels;
  STD_TORCH_CHECK(row >= channels, name, " has voxels that overlap");
  return {tensor.data_ptr(), row};
}

rsa::Shape shape_of(const Tensor& volume, int64_t axis) {
  STD_TORCH_CHECK(axis >= 2 && axis <= 4, "axis is ", axis, ", but must be 2, 3 or 4");
  return {volume.size(0), volume.size(4), volume.size(1), volume.size(2), volume.size(3), static_cast<int>(axis)};
}

cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// Sizes of partial maps (N, parts, S, S).
struct Partial {
  int64_t batch, parts, slices;
};

Partial check_partial(const Tensor& partial) {
  STD_TORCH_CHECK(partial.dim() == 4, "partial has ", partial.dim(), " dims, but must be (N, parts, S, S)");
  const Partial sizes{partial.size(0), partial.size(1), partial.size(2)};
  STD_TORCH_CHECK(partial.numel() > 0, "partial is empty");
  check(partial, "partial", partial, partial.scalar_type(), {sizes.batch, sizes.parts, sizes.slices, sizes.slices});
  return sizes;
}

void check_map(const Tensor& map, const char* name, const Tensor& like, ScalarType type, int64_t batch,
               int64_t slices) {
  check(map, name, like, type, {batch, padded(slices), padded(slices)});
}

Tensor contract(const Tensor& left, const Tensor& right, int64_t axis, bool tf32) {
  const rsa::Number number = number_of(left, tf32, "left");
  const rsa::Volume left_volume = volume_of(left, "left", left), right_volume = volume_of(right, "right", left);
  const rsa::Shape shape = shape_of(left, axis);
  const Guard guard(left.get_device_index());
  int64_t parts = 1;
  STD_CUDA_CHECK(rsa::contract_parts(number, shape, &parts));
  const int64_t slices = left.size(axis - 1);
  const int64_t sizes[] = {shape.batch, parts, slices, slices};
  const Tensor partial = torch::stable::new_empty(left, {sizes, 4}, sum_type(left.scalar_type()));
  const rsa::ContractLaunch launch{shape, left_volume, right_volume, partial.data_ptr(), parts};
  STD_CUDA_CHECK(rsa::contract(number, launch, current_stream(left)));
  return partial;
}

void mix(const Tensor& matrix, const Tensor& volume, int64_t axis, bool tf32, const std::optional<Tensor>& base,
         const std::optional<Tensor>& beta, const std::optional<Tensor>& row_scale,
         const std::optional<Tensor>& vector, const Tensor& out) {
  const rsa::Number number = number_of(volume, tf32, "volume");
  const ScalarType precise = sum_type(volume.scalar_type());
  const rsa::Shape shape = shape_of(volume, axis);
  const int64_t slices = volume.size(axis - 1);
  check_map(matrix, "matrix", volume, volume.scalar_type(), shape.batch, slices);
  rsa::MixLaunch launch{};
  launch.shape = shape;
  launch.matrix = matrix.data_ptr();
  launch.volume = volume_of(volume, "volume", volume);
  launch.out = volume_of(out, "out", volume);
  STD_TORCH_CHECK(launch.out.data != launch.volume.data, "out must not be volume, which other programs still read");
  if (base) launch.base = volume_of(*base, "base", volume);
  if (beta) {
    check(*beta, "beta", volume, precise, {});
    launch.beta = beta->data_ptr();
  }
  STD_TORCH_CHECK(row_scale.has_value() == vector.has_value(), "row_scale and vector must be given together");
  if (row_scale) {
    check(*row_scale, "row_scale", volume, precise, {shape.batch, padded(slices)});
    check(*vector, "vector", volume, precise, {shape.channels});
    launch.row_scale = row_scale->data_ptr();
    launch.vector = vector->data_ptr();
  }
  const Guard guard(volume.get_device_index());
  STD_CUDA_CHECK(rsa::mix(number, launch, current_stream(volume)));
}

void softmax(const Tensor& partial, double factor, const Tensor& attention, const Tensor& padded_map) {
  const Partial sizes = check_partial(partial);
  const rsa::Number number = number_of(padded_map, false, "padded_map");
  const ScalarType type = padded_map.scalar_type();
  check(partial, "partial", partial, sum_type(type), {sizes.batch, sizes.parts, sizes.slices, sizes.slices});
  check(attention, "attention", partial, sum_type(type), {sizes.batch, sizes.slices, sizes.slices});
  check_map(padded_map, "padded_map", partial, type, sizes.batch, sizes.slices);
  const Guard guard(partial.get_device_index());
  const rsa::SoftmaxLaunch launch{sizes.batch, sizes.slices,         sizes.parts,          partial.data_ptr(),
                                  factor,      attention.data_ptr(), padded_map.data_ptr()};
  STD_CUDA_CHECK(rsa::softmax(number, launch, current_stream(partial)));
}

void pad(const Tensor& attention, bool transposed, const Tensor& padded_map) {
  const rsa::Number number = number_of(padded_map, false, "padded_map");
  const ScalarType type = padded_map.scalar_type();
  STD_TORCH_CHECK(attention.dim() == 3 && attention.numel() > 0, "attention must be (N, S, S)");
  const int64_t batch = attention.size(0), slices = attention.size(1);
  check(attention, "attention", attention, sum_type(type), {batch, slices, slices});
  check_map(padded_map, "padded_map", attention, type, batch, slices);
  const Guard guard(attention.get_device_index());
  const rsa::PadLaunch launch{batch, slices, attention.data_ptr(), transposed, padded_map.data_ptr()};
  STD_CUDA_CHECK(rsa::pad(number, launch, current_stream(attention)));
}

void softmax_backward(const Tensor& partial, const Tensor& attention, const std::optional<Tensor>& beta, double factor,
                      const Tensor& grad_logits, const Tensor& grad_logits_transposed, const Tensor& row_dots) {
  const Partial sizes = check_partial(partial);
  const rsa::Number number = number_of(grad_logits, false, "grad_logits");
  const ScalarType type = grad_logits.scalar_type(), precise = sum_type(type);
  check(partial, "partial", partial, precise, {sizes.batch, sizes.parts, sizes.slices, sizes.slices});
  check(attention, "attention", partial, precise, {sizes.batch, sizes.slices, sizes.slices});
  if (beta) check(*beta, "beta", partial, precise, {});
  check_map(grad_logits, "grad_logits", partial, type, sizes.batch, sizes.slices);
  check_map(grad_logits_transposed, "grad_logits_transposed", partial, type, sizes.batch, sizes.slices);
  check(row_dots, "row_dots", partial, precise, {sizes.batch, padded(sizes.slices)});
  const Guard guard(partial.get_device_index());
  rsa::SoftmaxBackwardLaunch launch{};
  launch.batch = sizes.batch;
  launch.slices = sizes.slices;
  launch.parts = sizes.parts;
  launch.partial = partial.data_ptr();
  launch.attention = attention.data_ptr();
  launch.beta = beta ? beta->data_ptr() : nullptr;
  launch.factor = factor;
  launch.grad_logits = grad_logits.data_ptr();
  launch.grad_logits_transposed = grad_logits_transposed.data_ptr();
  launch.row_dots = row_dots.data_ptr();
  STD_CUDA_CHECK(rsa::softmax_backward(number, launch, current_stream(partial)));
}

void transpose(const Tensor& source, const Tensor& target) {
  STD_TORCH_CHECK(source.dim() == 3 && source.numel() > 0, "source must be (N, R, C)");
  const int64_t batch = source.size(0), rows = source.size(1), columns = source.size(2);
  check(source, "source", source, source.scalar_type(), {batch, rows, columns});
  check(target, "target", source, source.scalar_type(), {batch, columns, rows});
  const Guard guard(source.get_device_index());
  const rsa::TransposeLaunch launch{batch,   rows, columns, static_cast<int>(source.element_size()), source.data_ptr(),
                                    target.data_ptr()};
  STD_CUDA_CHECK(rsa::transpose(launch, current_stream(source)));
}

}  // namespace

STABLE_TORCH_LIBRARY(rsa_kernels_cuda, library) {
  library.def("contract(Tensor left, Tensor right, int axis, bool tf32) -> Tensor");
  library.def(
      "mix(Tensor matrix, Tensor volume, int axis, bool tf32, Tensor? base, Tensor? beta, Tensor? row_scale,"
      " Tensor? vector, Tensor(a!) out) -> ()");
  library.def("softmax(Tensor(a!) partial, float factor, Tensor(b!) attention, Tensor(c!) padded_map) -> ()");
  library.def("pad(Tensor attention, bool transposed, Tensor(a!) padded_map) -> ()");
  library.def(
      "softmax_backward(Tensor(a!) partial, Tensor attention, Tensor? beta, float factor, Tensor(b!) grad_logits,"
      " Tensor(c!) grad_logits_transposed, Tensor(d!) row_dots) -> ()");
  library.def("transpose(Tensor source, Tensor(a!) target) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(rsa_kernels_cuda, CUDA, library) {
  library.impl("contract", TORCH_BOX(&contract));
  library.impl("mix", TORCH_BOX(&mix));
  library.impl("softmax", TORCH_BOX(&softmax));
  library.impl("pad", TORCH_BOX(&pad));
  library.impl("softmax_backward", TORCH_BOX(&softmax_backward));
  library.impl("transpose", TORCH_BOX(&transpose));
}

// Importing the module is what loads the operators.
PyMODINIT_FUNC PyInit__cuda() {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_cuda", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
