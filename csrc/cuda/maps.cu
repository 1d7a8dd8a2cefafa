#include "dispatch.cuh"
#include "maps.cuh"

namespace rsa {
namespace {

static_assert(map_padding == 16, "padded_slices rounds up to it");

template <typename T>
__global__ void __launch_bounds__(map_threads) softmax_kernel(SoftmaxArguments<T> arguments) {
  softmax<T>(arguments);
}

template <typename T>
__global__ void __launch_bounds__(map_threads) pad_kernel(PadArguments<T> arguments) {
  pad<T>(arguments);
}

template <typename T>
__global__ void __launch_bounds__(map_threads) softmax_backward_kernel(SoftmaxBackwardArguments<T> arguments) {
  softmax_backward<T>(arguments);
}

// In memory tf32 is float32.
Number in_memory(Number number) { return number == Number::tf32 ? Number::float32 : number; }

template <typename Call>
cudaError_t with_map(Number number, const Call& call) {
  switch (in_memory(number)) {
    case Number::bfloat16:
      return call(bfloat16{});
    case Number::float16:
      return call(float16{});
    case Number::float64:
      return call(double{});
    default:
      return call(float{});
  }
}

}  // namespace

cudaError_t softmax(Number number, const SoftmaxLaunch& launch, cudaStream_t stream) {
  return with_map(number, [&](auto zero) {
    using T = decltype(zero);
    using Sum = typename Numbers<T>::Sum;
    const SoftmaxArguments<T> arguments{static_cast<Sum*>(launch.partial), static_cast<Sum*>(launch.attention),
                                        static_cast<T*>(launch.padded_map), static_cast<Sum>(launch.factor),
                                        launch.slices, launch.parts};
    return launch_kernel(softmax_kernel<T>, launch.batch * padded_slices(launch.slices), map_threads, map_shared<Sum>,
                         stream, arguments);
  });
}

cudaError_t pad(Number number, const PadLaunch& launch, cudaStream_t stream) {
  return with_map(number, [&](auto zero) {
    using T = decltype(zero);
    using Sum = typename Numbers<T>::Sum;
    const PadArguments<T> arguments{static_cast<const Sum*>(launch.attention), static_cast<T*>(launch.padded_map),
                                    launch.slices, launch.transposed};
    return launch_kernel(pad_kernel<T>, launch.batch * padded_slices(launch.slices), map_threads, 0, stream, arguments);
  });
}

cudaError_t softmax_backward(Number number, const SoftmaxBackwardLaunch& launch, cudaStream_t stream) {
  return with_map(number, [&](auto zero) {
    using T = decltype(zero);
    using Sum = typename Numbers<T>::Sum;
    const SoftmaxBackwardArguments<T> arguments{static_cast<Sum*>(launch.partial),
                                                static_cast<const Sum*>(launch.attention),
                                                static_cast<const Sum*>(launch.beta),
                                                static_cast<T*>(launch.grad_logits),
                                                static_cast<T*>(launch.grad_logits_transposed),
                                                static_cast<Sum*>(launch.row_dots),
                                                static_cast<Sum>(launch.factor),
                                                launch.slices,
                                                launch.parts};
    return launch_kernel(softmax_backward_kernel<T>, launch.batch * padded_slices(launch.slices), map_threads,
                         map_shared<Sum>, stream, arguments);
  });
}

}  // namespace rsa
