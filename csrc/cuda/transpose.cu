#include "dispatch.cuh"
#include "transpose.cuh"

namespace rsa {
namespace {

template <typename Number>
__global__ void __launch_bounds__(TransposeTile<Number>::threads) transpose_kernel(TransposeArguments arguments) {
  transpose<Number>(arguments);
}

template <typename Number>
cudaError_t launch_transpose(const TransposeLaunch& launch, cudaStream_t stream) {
  using Tile = TransposeTile<Number>;
  const TransposeArguments arguments{launch.source, launch.target, launch.rows, launch.columns};
  const int64_t tiles = ceil_divide(launch.rows, Tile::side) * ceil_divide(launch.columns, Tile::side);
  return launch_kernel(transpose_kernel<Number>, tiles * launch.batch, Tile::threads, Tile::shared, stream, arguments);
}

}  // namespace

cudaError_t transpose(const TransposeLaunch& launch, cudaStream_t stream) {
  switch (launch.number_bytes) {
    case 2:
      return launch_transpose<uint16_t>(launch, stream);
    case 4:
      return launch_transpose<uint32_t>(launch, stream);
    case 8:
      return launch_transpose<uint64_t>(launch, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace rsa
