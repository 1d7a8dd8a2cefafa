// Launches the kernels: pointers, sizes and a stream; no torch. Every pointer is of device memory.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace rsa {

// The types of volumes, and how products of float32 ones are made.
enum class Number { bfloat16, float16, tf32, float32, float64 };

// Sizes of (N, C, D, H, W), and the axis of a step: 2, 3 or 4.
struct Shape {
  int64_t batch, channels, depth, height, width;
  int axis;
};

// A packed volume: voxel v has its channels at v * row.
struct Volume {
  void* data;
  int64_t row;
};

struct ContractLaunch {
  Shape shape;
  Volume left, right;
  void* partial;
  int64_t parts;  // see contract_parts
};

struct MixLaunch {
  Shape shape;
  const void* matrix;
  Volume volume, base, out;
  const void *beta, *row_scale, *vector;
};

struct SoftmaxLaunch {
  int64_t batch, slices, parts;
  void* partial;
  double factor;
  void *attention, *padded_map;
};

struct PadLaunch {
  int64_t batch, slices;
  const void* attention;
  bool transposed;
  void* padded_map;
};

struct SoftmaxBackwardLaunch {
  int64_t batch, slices, parts;
  void* partial;
  const void *attention, *beta;
  double factor;
  void *grad_logits, *grad_logits_transposed, *row_dots;
};

struct TransposeLaunch {
  int64_t batch, rows, columns;
  int number_bytes;  // 2, 4 or 8
  const void* source;
  void* target;
};

// The multiple that padded maps' sides are rounded up to.
constexpr int64_t map_padding = 16;

// How many partial maps a contraction leaves for each sample on the current device.
cudaError_t contract_parts(Number number, const Shape& shape, int64_t* parts);

cudaError_t contract(Number number, const ContractLaunch& launch, cudaStream_t stream);
cudaError_t mix(Number number, const MixLaunch& launch, cudaStream_t stream);
cudaError_t softmax(Number number, const SoftmaxLaunch& launch, cudaStream_t stream);
cudaError_t pad(Number number, const PadLaunch& launch, cudaStream_t stream);
cudaError_t softmax_backward(Number number, const SoftmaxBackwardLaunch& launch, cudaStream_t stream);
cudaError_t transpose(const TransposeLaunch& launch, cudaStream_t stream);

}  // namespace rsa
