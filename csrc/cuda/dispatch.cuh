// From what a launch is asked for to the kernel that is compiled for it.
#pragma once

#include "index.cuh"
#include "launch.h"
#include "numbers.cuh"

namespace rsa {

inline Geometry geometry_of(const Shape& shape) {
  return geometry(shape.batch, shape.channels, shape.depth, shape.height, shape.width, shape.axis);
}

template <typename T>
int width_of(const Volume& volume, int64_t channels) {
  return width_of(reinterpret_cast<uintptr_t>(volume.data), channels, volume.row, static_cast<int>(sizeof(T)));
}

inline cudaError_t processors(int64_t* count) {
  int device = 0, found = 1;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&found, cudaDevAttrMultiProcessorCount, device);
  *count = found;
  return error;
}

// Calls call(T{}) with the type of a volume's numbers.
template <typename Call>
cudaError_t with_number(Number number, const Call& call) {
  switch (number) {
    case Number::bfloat16:
      return call(bfloat16{});
    case Number::float16:
      return call(float16{});
    case Number::tf32:
      return call(tf32{});
    case Number::float32:
      return call(float{});
    case Number::float64:
      return call(double{});
  }
  return cudaErrorInvalidValue;
}

template <int SIDE>
struct Side {
  static constexpr int value = SIDE;
};

// Calls call(Side{}) with the tile that a map of so many slices is made in; sums in float64 fit registers up to 64.
template <typename T, typename Call>
cudaError_t with_side(int64_t slices, const Call& call) {
  if (slices <= 32) return call(Side<32>{});
  if constexpr (sizeof(typename Numbers<T>::Sum) == 8) {
    return call(Side<64>{});
  } else {
    return slices <= 64 ? call(Side<64>{}) : call(Side<128>{});
  }
}

template <typename Arguments>
cudaError_t launch_kernel(void (*kernel)(Arguments), int64_t blocks, int threads, int shared, cudaStream_t stream,
                          const Arguments& arguments) {
  if (blocks > 2147483647) return cudaErrorInvalidConfiguration;
  if (shared > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (error != cudaSuccess) return error;
  }
  kernel<<<static_cast<unsigned>(blocks), threads, shared, stream>>>(arguments);
  return cudaGetLastError();
}

}  // namespace rsa
