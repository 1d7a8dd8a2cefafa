// LibTorch's stable ABI: tensors in, pointers, sizes and torch's threads on to block.cpp. What users give is checked in
// Python before; what is checked here protects memory.
#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <atomic>
#include <optional>
#include <string>
#include <vector>

#include "block.h"
#include "norm.h"
#include "processor.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

rsa::Element element_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double: return rsa::Element::kFloat64;
    case ScalarType::Float: return rsa::Element::kFloat32;
    case ScalarType::BFloat16: return rsa::Element::kBFloat16;
    case ScalarType::Half: return rsa::Element::kFloat16;
    default: STD_TORCH_CHECK(false, "volumes must be float64, float32, bfloat16 or float16");
  }
  return rsa::Element::kFloat32;
}

ScalarType accumulation_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

rsa::Volume volume_of(const Tensor& tensor, const Tensor& like) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.dim() == 5 && tensor.scalar_type() == like.scalar_type(),
                  "a volume must be (N, C, D, H, W) on the CPU, of one dtype with the others");
  rsa::Volume volume;
  volume.data = tensor.data_ptr();
  for (int dim = 0; dim < 5; ++dim) {
    STD_TORCH_CHECK(tensor.size(dim) == like.size(dim), "volumes must have one shape");
    volume.sizes[dim] = tensor.size(dim);
    volume.strides[dim] = tensor.stride(dim);
  }
  return volume;
}

// Inner inputs are flat, and ours alone: their channels are neighbours, which makes them quick to read along every axis.
std::vector<rsa::Volume> inner_volumes(const std::vector<Tensor>& flat, const Tensor& x) {
  std::vector<rsa::Volume> volumes;
  for (const Tensor& tensor : flat) {
    STD_TORCH_CHECK(tensor.is_contiguous() && tensor.numel() == x.numel() && tensor.scalar_type() == x.scalar_type(),
                    "an inner input must be flat, with the elements and the dtype of x");
    rsa::Volume volume;
    volume.data = tensor.data_ptr();
    int64_t stride = 1;
    for (const int dim : {1, 4, 3, 2, 0}) {
      volume.sizes[dim] = x.size(dim);
      volume.strides[dim] = stride;
      stride *= x.size(dim);
    }
    volumes.push_back(volume);
  }
  return volumes;
}

void* values_of(const Tensor& tensor, const Tensor& x, int64_t elements) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.is_contiguous() && tensor.numel() == elements &&
                      tensor.scalar_type() == accumulation_type(x),
                  "weights and maps must be contiguous, in the accumulation dtype");
  return tensor.data_ptr();
}

// theta_weight, theta_bias, phi_weight, g_weight, g_bias, betas; or their gradients.
rsa::Weights weights_of(const std::vector<Tensor>& tensors, const Tensor& x, int64_t steps) {
  STD_TORCH_CHECK(tensors.size() == 6, "six tensors of weights are wanted");
  const int64_t channels = x.size(1), square = channels * channels;
  return {values_of(tensors[0], x, square),   values_of(tensors[1], x, channels), values_of(tensors[2], x, square),
          values_of(tensors[3], x, square),   values_of(tensors[4], x, channels), values_of(tensors[5], x, steps)};
}

std::vector<void*> maps_of(const std::vector<Tensor>& tensors, const Tensor& x, const std::vector<int64_t>& axes) {
  STD_TORCH_CHECK(tensors.size() == axes.size(), "one map per axis is wanted");
  std::vector<void*> maps;
  for (size_t i = 0; i < axes.size(); ++i) {
    STD_TORCH_CHECK(axes[i] >= 2 && axes[i] <= 4, "an axis must be 2, 3 or 4");
    maps.push_back(values_of(tensors[i], x, x.size(0) * x.size(axes[i]) * x.size(axes[i])));
  }
  return maps;
}

// Memory and threads from torch, for the time of a call.
class TorchHost {
 public:
  explicit TorchHost(const Tensor& x) : type_(accumulation_type(x)) {
    host.threads = torch::stable::get_num_threads();
    host.allocate = [this](int64_t elements) {
      const int64_t size[] = {elements};
      kept_.push_back(torch::stable::empty({size, 1}, type_));
      return kept_.back().data_ptr();
    };
    host.parallel = [](int64_t count, const std::function<void(int64_t, int64_t)>& body) {
      torch::stable::parallel_for(0, count, 1, body);
    };
    host.thread = [] {
      uint32_t index = 0;
      TORCH_ERROR_CODE_CHECK(torch_get_thread_idx(&index));
      return static_cast<int64_t>(index);
    };
  }
  rsa::Host host;

 private:
  ScalarType type_;
  std::vector<Tensor> kept_;
};

std::atomic<int> instruction_set{rsa::best_instruction_set()};

rsa::Block block_of(const Tensor& x, const TorchHost& memory, std::vector<int64_t> axes, double scale) {
  const rsa::Element element = element_of(x);
  return {rsa::passes_for(instruction_set, element), element, memory.host, std::move(axes), scale};
}

void block(Tensor x, std::vector<Tensor> weights, std::vector<int64_t> axes, double scale, Tensor out,
           std::vector<Tensor> maps, std::vector<Tensor> inputs) {
  const TorchHost memory(x);
  const rsa::Volume volume = volume_of(x, x), target = volume_of(out, x);
  rsa::forward(block_of(x, memory, axes, scale), volume, weights_of(weights, x, axes.size()), target,
               maps_of(maps, x, axes), inner_volumes(inputs, x));
}

void block_backward(Tensor grad, Tensor x, std::vector<Tensor> inputs, int64_t known, std::vector<Tensor> maps,
                    std::vector<Tensor> weights, std::vector<int64_t> axes, double scale, std::vector<Tensor> work,
                    Tensor out, bool need_x, bool need_folded, bool need_value, std::vector<Tensor> grads) {
  const TorchHost memory(x);
  const rsa::Volume volume = volume_of(x, x), target = volume_of(out, x);
  STD_TORCH_CHECK(inputs.size() + 1 == axes.size(), "one inner input for each axis but the first is wanted");
  rsa::backward(block_of(x, memory, axes, scale), volume_of(grad, x), volume, inner_volumes(inputs, x), known,
                maps_of(maps, x, axes), weights_of(weights, x, axes.size()),
                work.empty() ? target : inner_volumes(work, x)[0], target, need_x, need_folded, need_value,
                weights_of(grads, x, axes.size()));
}

void contract(Tensor left, Tensor right, int64_t axis, Tensor logits) {
  const TorchHost memory(left);
  const auto maps = maps_of({logits}, left, {axis});
  rsa::contract(block_of(left, memory, {axis}, 1), volume_of(left, left), volume_of(right, left), maps[0]);
}

void mix(Tensor x, Tensor matrix, bool transposed, int64_t axis, Tensor out) {
  const TorchHost memory(x);
  const auto maps = maps_of({matrix}, x, {axis});
  rsa::mix(block_of(x, memory, {axis}, 1), volume_of(x, x), maps[0], transposed, volume_of(out, x));
}

// Rows of channels that are neighbours.
void* rows_of(const Tensor& tensor, const Tensor& like) {
  const rsa::Volume volume = volume_of(tensor, like);
  int64_t stride = 1;
  for (const int dim : {1, 4, 3, 2, 0}) {
    STD_TORCH_CHECK(volume.sizes[dim] == 1 || volume.strides[dim] == stride, "a volume must be in channels_last_3d");
    stride *= volume.sizes[dim];
  }
  return volume.data;
}

double* moments_of(const Tensor& tensor, const Tensor& x, int64_t groups) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.is_contiguous() && tensor.numel() == 2 * x.size(0) * groups &&
                      tensor.scalar_type() == ScalarType::Double,
                  "moments must be contiguous, in float64");
  return static_cast<double*>(tensor.data_ptr());
}

rsa::GroupNorm norm_of(const Tensor& x, const TorchHost& memory, const std::vector<Tensor>& weights, int64_t groups,
                       bool relu) {
  STD_TORCH_CHECK(x.dim() == 5 && x.numel() > 0 && groups > 0 && x.size(1) % groups == 0,
                  "a volume with channels that the groups divide is wanted");
  STD_TORCH_CHECK(weights.empty() || weights.size() == 2, "a weight and a bias are wanted, or neither");
  const rsa::Element element = element_of(x);
  rsa::GroupNorm norm{rsa::passes_for(instruction_set, element), element, memory.host, x.size(0),
                      x.size(2) * x.size(3) * x.size(4), x.size(1), groups, nullptr, nullptr, relu};
  if (!weights.empty()) {
    norm.weight = values_of(weights[0], x, x.size(1));
    norm.bias = values_of(weights[1], x, x.size(1));
  }
  return norm;
}

void group_norm(Tensor x, std::vector<Tensor> weights, int64_t groups, double eps, bool relu, Tensor out,
                Tensor moments) {
  const TorchHost memory(x);
  rsa::group_norm(norm_of(x, memory, weights, groups, relu), rows_of(x, x), eps, rows_of(out, x),
                  moments_of(moments, x, groups));
}

void group_norm_backward(Tensor grad, Tensor x, Tensor moments, std::vector<Tensor> weights, int64_t groups, bool relu,
                         Tensor out, std::vector<Tensor> grads) {
  const TorchHost memory(x);
  const rsa::GroupNorm norm = norm_of(x, memory, weights, groups, relu);
  STD_TORCH_CHECK(grads.size() == weights.size(), "a gradient for each weight is wanted");
  void* of_weights[2] = {nullptr, nullptr};
  for (size_t i = 0; i < grads.size(); ++i) of_weights[i] = values_of(grads[i], x, x.size(1));
  rsa::group_norm_backward(norm, rows_of(grad, x), rows_of(x, x), moments_of(moments, x, groups),
                           rows_of(out, x), of_weights[0], of_weights[1]);
}

std::string use_instruction_set(std::string name) {
  if (!name.empty()) {
    const int wanted = rsa::instruction_set_of(name.c_str());
    STD_TORCH_CHECK(wanted >= 0, "this processor does not have the instruction set ", name);
    instruction_set = wanted;
  }
  return rsa::name_of(instruction_set);
}

}  // namespace

STABLE_TORCH_LIBRARY(rsa_kernels_cpp, m) {
  m.def(
      "block(Tensor x, Tensor[] weights, int[] axes, float scale, Tensor(a!) out, Tensor(b!)[] maps,"
      " Tensor(c!)[] inputs) -> ()");
  m.def(
      "block_backward(Tensor grad, Tensor x, Tensor(a!)[] inputs, int known, Tensor[] maps, Tensor[] weights,"
      " int[] axes, float scale, Tensor(b!)[] work, Tensor(c!) out, bool need_x, bool need_folded, bool need_value,"
      " Tensor(d!)[] grads) -> ()");
  m.def("contract(Tensor left, Tensor right, int axis, Tensor(a!) logits) -> ()");
  m.def("mix(Tensor x, Tensor matrix, bool transposed, int axis, Tensor(a!) out) -> ()");
  m.def(
      "group_norm(Tensor x, Tensor[] weights, int groups, float eps, bool relu, Tensor(a!) out, Tensor(b!) moments)"
      " -> ()");
  m.def(
      "group_norm_backward(Tensor grad, Tensor x, Tensor moments, Tensor[] weights, int groups, bool relu,"
      " Tensor(a!) out, Tensor(b!)[] grads) -> ()");
  m.def("use_instruction_set(str name) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(rsa_kernels_cpp, CompositeExplicitAutograd, m) {
  m.impl("block", TORCH_BOX(&block));
  m.impl("block_backward", TORCH_BOX(&block_backward));
  m.impl("contract", TORCH_BOX(&contract));
  m.impl("mix", TORCH_BOX(&mix));
  m.impl("group_norm", TORCH_BOX(&group_norm));
  m.impl("group_norm_backward", TORCH_BOX(&group_norm_backward));
  m.impl("use_instruction_set", TORCH_BOX(&use_instruction_set));
}

// Importing the module is what registers the operators.
PyMODINIT_FUNC PyInit__cpp(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_cpp", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
