#include "dispatch.cuh"
#include "mix.cuh"

namespace rsa {
namespace {

template <typename T, int SIDE>
__global__ void __launch_bounds__(MixTile<T, SIDE>::threads, MixTile<T, SIDE>::per_processor)
    mix_kernel(MixArguments<T> arguments) {
  mix<T, SIDE>(arguments);
}

}  // namespace

cudaError_t mix(Number number, const MixLaunch& launch, cudaStream_t stream) {
  int64_t count = 1;
  const cudaError_t error = processors(&count);
  if (error != cudaSuccess) return error;
  const Geometry shape = geometry_of(launch.shape);
  return with_number(number, [&](auto zero) {
    using T = decltype(zero);
    using Sum = typename Numbers<T>::Sum;
    const bool aligned = width_of<T>(launch.out, shape.channels) == 16 &&
                         (!launch.base.data || width_of<T>(launch.base, shape.channels) == 16);
    return with_side<T>(shape.slices, [&](auto side) {
      constexpr int SIDE = decltype(side)::value;
      using Tile = MixTile<T, SIDE>;
      const int64_t blocks = ceil_divide(shape.slices, SIDE);
      const int64_t chunks = ceil_divide(shape.columns(), Tile::columns);
      const int64_t parts = parts_of(chunks, blocks, shape.batch, count * Tile::per_processor, 1);
      const MixArguments<T> arguments{static_cast<const T*>(launch.matrix),
                                      static_cast<const T*>(launch.volume.data),
                                      static_cast<const T*>(launch.base.data),
                                      static_cast<const Sum*>(launch.beta),
                                      static_cast<const Sum*>(launch.row_scale),
                                      static_cast<const Sum*>(launch.vector),
                                      static_cast<T*>(launch.out.data),
                                      shape,
                                      launch.volume.row,
                                      launch.base.row,
                                      launch.out.row,
                                      parts,
                                      width_of<T>(launch.volume, shape.channels),
                                      aligned};
      return launch_kernel(mix_kernel<T, SIDE>, blocks * parts * shape.batch, Tile::threads, Tile::shared, stream,
                           arguments);
    });
  });
}

}  // namespace rsa
