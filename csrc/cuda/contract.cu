#include "contract.cuh"
#include "dispatch.cuh"

namespace rsa {
namespace {

// Chunks that a program should have at least, or its partial map costs more than it saves.
constexpr int64_t least_chunks = 4;

template <typename T, int SIDE>
__global__ void __launch_bounds__(ContractTile<T, SIDE>::threads, ContractTile<T, SIDE>::per_processor)
    contract_kernel(ContractArguments<T> arguments) {
  contract<T, SIDE>(arguments);
}

}  // namespace

cudaError_t contract_parts(Number number, const Shape& shape, int64_t* parts) {
  int64_t count = 1;
  const cudaError_t error = processors(&count);
  if (error != cudaSuccess) return error;
  const Geometry volume = geometry_of(shape);
  return with_number(number, [&](auto zero) {
    using T = decltype(zero);
    return with_side<T>(volume.slices, [&](auto side) {
      constexpr int SIDE = decltype(side)::value;
      using Tile = ContractTile<T, SIDE>;
      const int64_t blocks = ceil_divide(volume.slices, SIDE);
      const int64_t chunks = ceil_divide(volume.columns(), Tile::columns);
      *parts = parts_of(chunks, blocks * blocks, volume.batch, count * Tile::per_processor, least_chunks);
      return cudaSuccess;
    });
  });
}

cudaError_t contract(Number number, const ContractLaunch& launch, cudaStream_t stream) {
  const Geometry shape = geometry_of(launch.shape);
  return with_number(number, [&](auto zero) {
    using T = decltype(zero);
    const int left = width_of<T>(launch.left, shape.channels), right = width_of<T>(launch.right, shape.channels);
    const ContractArguments<T> arguments{static_cast<const T*>(launch.left.data),
                                         static_cast<const T*>(launch.right.data),
                                         static_cast<typename Numbers<T>::Sum*>(launch.partial),
                                         shape,
                                         launch.left.row,
                                         launch.right.row,
                                         launch.parts,
                                         left < right ? left : right};
    return with_side<T>(shape.slices, [&](auto side) {
      constexpr int SIDE = decltype(side)::value;
      using Tile = ContractTile<T, SIDE>;
      const int64_t blocks = ceil_divide(shape.slices, SIDE);
      return launch_kernel(contract_kernel<T, SIDE>, blocks * blocks * launch.parts * shape.batch, Tile::threads,
                           Tile::shared, stream, arguments);
    });
  });
}

}  // namespace rsa
