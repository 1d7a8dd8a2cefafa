// Runs the kernels' bodies on the CPU: a C interface over the emulator, for test_index.py.
#include "contract.cuh"
#include "maps.cuh"
#include "mix.cuh"
#include "transpose.cuh"

using namespace rsa;

#if defined(_WIN32)
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace {

// Numbers as launch.h orders them: bfloat16, float16, tf32, float32, float64.
template <typename Call>
void with_number(int number, const Call& call) {
  if (number == 0) call(bfloat16{});
  if (number == 1) call(float16{});
  if (number == 2) call(tf32{});
  if (number == 3) call(float{});
  if (number == 4) call(double{});
}

template <int SIDE>
struct Side {
  static constexpr int value = SIDE;
};

template <typename T, typename Call>
void with_side(int side, const Call& call) {
  if (side == 32) call(Side<32>{});
  if (side == 64) call(Side<64>{});
  if constexpr (sizeof(T) < 8) {
    if (side == 128) call(Side<128>{});
  }
}

Geometry geometry_of(const int64_t* sizes, int axis) {
  return geometry(sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], axis);
}

}  // namespace

EXPORT void emulate_contract(int number, int side, const int64_t* sizes, int axis, const void* left, int64_t left_row,
                             const void* right, int64_t right_row, int width, int64_t parts, void* partial) {
  const Geometry shape = geometry_of(sizes, axis);
  with_number(number, [&](auto zero) {
    using T = decltype(zero);
    with_side<T>(side, [&](auto chosen) {
      constexpr int SIDE = decltype(chosen)::value;
      const ContractArguments<T> arguments{static_cast<const T*>(left),
                                           static_cast<const T*>(right),
                                           static_cast<typename Numbers<T>::Sum*>(partial),
                                           shape,
                                           left_row,
                                           right_row,
                                           parts,
                                           width};
      const int64_t blocks = ceil_divide(shape.slices, SIDE);
      using Tile = ContractTile<T, SIDE>;
      emulator::launch(blocks * blocks * parts * shape.batch, Tile::threads, Tile::shared,
                       [&] { contract<T, SIDE>(arguments); });
    });
  });
}

EXPORT void emulate_mix(int number, int side, const int64_t* sizes, int axis, const void* matrix, const void* volume,
                        int64_t volume_row, const void* base, int64_t base_row, const void* beta,
                        const void* row_scale, const void* vector, void* out, int64_t out_row, int width, int aligned,
                        int64_t parts) {
  const Geometry shape = geometry_of(sizes, axis);
  with_number(number, [&](auto zero) {
    using T = decltype(zero);
    using Sum = typename Numbers<T>::Sum;
    with_side<T>(side, [&](auto chosen) {
      constexpr int SIDE = decltype(chosen)::value;
      const MixArguments<T> arguments{static_cast<const T*>(matrix),
                                      static_cast<const T*>(volume),
                                      static_cast<const T*>(base),
                                      static_cast<const Sum*>(beta),
                                      static_cast<const Sum*>(row_scale),
                                      static_cast<const Sum*>(vector),
                                      static_cast<T*>(out),
                                      shape,
                                      volume_row,
                                      base_row,
                                      out_row,
                                      parts,
                                      width,
                                      aligned != 0};
      const int64_t blocks = ceil_divide(shape.slices, SIDE);
      using Tile = MixTile<T, SIDE>;
      emulator::launch(blocks * parts * shape.batch, Tile::threads, Tile::shared, [&] { mix<T, SIDE>(arguments); });
    });
  });
}

EXPORT void emulate_softmax(int number, int64_t batch, int64_t slices, int64_t parts, void* partial, double factor,
                            void* attention, void* padded_map) {
  with_number(number, [&](auto zero) {
    using T = decltype(zero);
    using Sum = typename Numbers<T>::Sum;
    const SoftmaxArguments<T> arguments{static_cast<Sum*>(partial), static_cast<Sum*>(attention),
                                        static_cast<T*>(padded_map), static_cast<Sum>(factor), slices, parts};
    emulator::launch(batch * padded_slices(slices), map_threads, map_shared<Sum>, [&] { softmax<T>(arguments); });
  });
}

EXPORT void emulate_pad(int number, int64_t batch, int64_t slices, const void* attention, int transposed,
                        void* padded_map) {
  with_number(number, [&](auto zero) {
    using T = decltype(zero);
    using Sum = typename Numbers<T>::Sum;
    const PadArguments<T> arguments{static_cast<const Sum*>(attention), static_cast<T*>(padded_map), slices,
                                    transposed != 0};
    emulator::launch(batch * padded_slices(slices), map_threads, 0, [&] { pad<T>(arguments); });
  });
}

EXPORT void emulate_softmax_backward(int number, int64_t batch, int64_t slices, int64_t parts, void* partial,
                                     const void* attention, const void* beta, double factor, void* grad_logits,
                                     void* grad_logits_transposed, void* row_dots) {
  with_number(number, [&](auto zero) {
    using T = decltype(zero);
    using Sum = typename Numbers<T>::Sum;
    const SoftmaxBackwardArguments<T> arguments{static_cast<Sum*>(partial),
                                                static_cast<const Sum*>(attention),
                                                static_cast<const Sum*>(beta),
                                                static_cast<T*>(grad_logits),
                                                static_cast<T*>(grad_logits_transposed),
                                                static_cast<Sum*>(row_dots),
                                                static_cast<Sum>(factor),
                                                slices,
                                                parts};
    emulator::launch(batch * padded_slices(slices), map_threads, map_shared<Sum>,
                     [&] { softmax_backward<T>(arguments); });
  });
}

EXPORT void emulate_transpose(int number_bytes, int64_t batch, int64_t rows, int64_t columns, const void* source,
                              void* target) {
  const TransposeArguments arguments{source, target, rows, columns};
  const auto run = [&](auto zero) {
    using Number = decltype(zero);
    using Tile = TransposeTile<Number>;
    const int64_t tiles = ceil_divide(rows, Tile::side) * ceil_divide(columns, Tile::side);
    emulator::launch(tiles * batch, Tile::threads, Tile::shared, [&] { transpose<Number>(arguments); });
  };
  if (number_bytes == 2) run(uint16_t{});
  if (number_bytes == 4) run(uint32_t{});
  if (number_bytes == 8) run(uint64_t{});
}

// The arithmetic that the kernels stand on, alone.
EXPORT void column_of(const int64_t* sizes, int axis, int64_t k, int64_t* result) {
  const Geometry shape = geometry_of(sizes, axis);
  const Column column = column_at(shape, k);
  result[0] = column.voxel;
  result[1] = column.channel;
  result[2] = column.exists;
}

EXPORT int64_t element_of(const int64_t* sizes, int axis, int64_t row, int64_t sample, int64_t slice, int64_t k) {
  const Geometry shape = geometry_of(sizes, axis);
  return element(shape, row, sample, slice, column_at(shape, k));
}

EXPORT int64_t parts_for(int64_t chunks, int64_t tiles, int64_t batch, int64_t programs, int64_t least) {
  return parts_of(chunks, tiles, batch, programs, least);
}

EXPORT int64_t chunks_for(int64_t chunks, int64_t part, int64_t parts) { return chunks_of_part(chunks, part, parts); }

EXPORT void program_for(int64_t block, int64_t tiles, int64_t parts, int64_t* result) {
  const Program program = program_at(block, tiles, parts);
  result[0] = program.tile;
  result[1] = program.part;
  result[2] = program.sample;
}

EXPORT int width_for(uint64_t address, int64_t channels, int64_t row, int number) {
  return width_of(address, channels, row, number);
}

EXPORT int stride_of_contract(int number, int side) {
  int stride = 0;
  with_number(number, [&](auto zero) {
    using T = decltype(zero);
    with_side<T>(side, [&](auto chosen) { stride = ContractTile<T, decltype(chosen)::value>::stride; });
  });
  return stride;
}

EXPORT void strides_of_mix(int number, int side, int* result) {
  with_number(number, [&](auto zero) {
    using T = decltype(zero);
    with_side<T>(side, [&](auto chosen) {
      using Tile = MixTile<T, decltype(chosen)::value>;
      result[0] = Tile::map_stride;
      result[1] = Tile::volume_stride;
    });
  });
}

// Bytes of dynamic shared memory of a kernel's block, for check.py.
EXPORT int shared_of_contract(int number, int side) {
  int shared = 0;
  with_number(number, [&](auto zero) {
    using T = decltype(zero);
    with_side<T>(side, [&](auto chosen) { shared = ContractTile<T, decltype(chosen)::value>::shared; });
  });
  return shared;
}

EXPORT int shared_of_mix(int number, int side) {
  int shared = 0;
  with_number(number, [&](auto zero) {
    using T = decltype(zero);
    with_side<T>(side, [&](auto chosen) { shared = MixTile<T, decltype(chosen)::value>::shared; });
  });
  return shared;
}

EXPORT int shared_of_maps(int number) { return number == 4 ? map_shared<double> : map_shared<float>; }

EXPORT int shared_of_transpose(int number_bytes) {
  return number_bytes == 2   ? TransposeTile<uint16_t>::shared
         : number_bytes == 4 ? TransposeTile<uint32_t>::shared
                             : TransposeTile<uint64_t>::shared;
}

EXPORT float round_trip(int number, float value) {
  float result = value;
  with_number(number, [&](auto zero) { result = static_cast<float>(widen(rounded<decltype(zero)>(value))); });
  return result;
}
