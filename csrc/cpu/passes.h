// What the driver asks of the kernels: passes over a range of positions of one sample, for one element type, compiled
// once for each instruction set. Plain data and pointers only: the kernels know neither torch nor threads.
#pragma once

#include <cstdint>

namespace rsa {

enum class Element { kFloat64, kFloat32, kBFloat16, kFloat16 };

// Positions in a line of memory, where tiles and ranges begin if they are that long.
constexpr int64_t LINE = 16;

// One sample of a volume as a step sees it: strides in elements. A position is `outer * sizes.inner + inner`.
struct View {
  void* data;
  int64_t slice, outer, inner, channel;
};

// Sizes of a step, and the range of positions that a pass walks, in tiles of at most `tile` positions.
struct Range {
  int64_t slices, channels, inner;
  int64_t begin, end, tile;
};

// Buffers are in the accumulation type, float, or double for float64, but for sums over voxels that are double here.
// Matrices of channels are in panels: see kernels.h; those that passes read are prepared first where there is `prepare`.
struct Passes {
  // logits (S, S) += <M^T x_i + u, x_j>
  void (*map)(const Range&, View x, const void* m, const void* u, double* logits, void* scratch);
  // out = x + Wv (attention x) + bias, with beta inside `attention` (S, S) and `bias` (C); out may be x
  void (*mix)(const Range&, View x, const void* attention, const void* value, const void* bias, View out, void* scratch);
  // products (S, S) += <Wv^T grad_i, x_j>, grad_sum (C) += sum of grad, value_grad += grad (attention x)^T if not null,
  // out = grad + attention^T Wv^T grad if out.data is not null; beta inside `attention`; out may be grad
  void (*map_backward)(const Range&, View x, View grad, const void* attention, const void* value_transposed,
                       double* products, double* grad_sum, void* value_grad, View out, void* scratch);
  // m_grad += x (grad_logits x)^T, u_grad (C) += sum_j column_j (x_j 1) if m_grad is not null,
  // out = partial + M (grad_logits x) + M^T (grad_logits^T x) + u column if out.data is not null; out may be partial
  void (*mix_backward)(const Range&, View x, View partial, const void* grad_logits, const void* column, const void* m,
                       const void* m_transposed, const void* u, void* m_grad, double* u_grad, View out, void* scratch);
  // products (S, S) += <left_i, right_j>
  void (*contract)(const Range&, View left, View right, double* products, void* scratch);
  // out = matrix x, or matrix^T x
  void (*mix_slices)(const Range&, View x, const void* matrix, bool transposed, View out, void* scratch);

  // Rows [begin, end) of panels as the passes read them, `begin` being even; m as `map` and `mix_backward` do if `split`.
  // Null where they read panels.
  void (*prepare)(int64_t channels, int64_t begin, int64_t end, const void* panels, bool split, void* to);
  int64_t (*prepared_elements)(int64_t channels, bool split);

  // Matrices (C, C) in row order: packed by panels of columns, transposed or not, and back; rows [begin, end) of the result.
  void (*pack_matrix)(int64_t channels, int64_t begin, int64_t end, const void* matrix, bool transposed, void* panels);
  void (*unpack_matrix)(int64_t channels, int64_t begin, int64_t end, const void* panels, void* matrix);
  // Rows [begin, end) of panels `total (C, C) += left^T right`.
  void (*correlate)(int64_t channels, int64_t begin, int64_t end, const void* left, const void* right, void* total);
  // Rows [begin, end) of `out = rows weights`, all in panels.
  void (*project)(int64_t channels, int64_t begin, int64_t end, const void* rows, const void* weights, void* out);

  // Group norm of rows of C neighbours: see norm_kernels.h; vectors (C), `sums (2, C)` +=.
  // of x + minus, and of its square
  void (*norm_sums)(int64_t channels, int64_t rows, const void* x, const void* minus, double* sums);
  // out = x scale + shift, and its ReLU; out may be x
  void (*norm_apply)(int64_t channels, int64_t rows, const void* x, const void* scale, const void* shift, bool relu,
                     void* out);
  // of grad, where the ReLU lets it through, and of grad (x + minus)
  void (*norm_backward_sums)(int64_t channels, int64_t rows, const void* grad, const void* x, const void* scale,
                             const void* shift, bool relu, const void* minus, double* sums);
  // out = grad scale + x of_x + rest; out may be grad
  void (*norm_backward)(int64_t channels, int64_t rows, const void* grad, const void* x, const void* scale,
                        const void* shift, bool relu, const void* of_x, const void* rest, void* out);

  // Bytes of the element type, elements of a (C, C) matrix in panels, elements of scratch, positions in a tile.
  int64_t accumulator_bytes;
  int64_t (*panel_elements)(int64_t channels);
  int64_t (*scratch_elements)(int64_t slices, int64_t channels, int64_t tile, bool backward);
  int64_t (*tile_positions)(int64_t slices, int64_t channels);
};

const Passes& plain_passes(Element element);
#if defined(__x86_64__) || defined(_M_X64)
#define RSA_X86 1
const Passes& avx2_passes(Element element);
const Passes& avx512_passes(Element element);
// For volumes in bfloat16 alone, and by compilers that know products of pairs.
#if defined(__clang__) ? __clang_major__ >= 10 : defined(__GNUC__) ? __GNUC__ >= 11 : _MSC_VER >= 1930
#define RSA_BF16 1
const Passes& avx512_bf16_passes();
// And with its products of tiles, which the system has to allow.
#if defined(__linux__) && defined(__x86_64__)
#define RSA_AMX 1
const Passes& amx_passes();
#endif
#endif
#endif

}  // namespace rsa
