// The block and the attention core on the CPU: which ranges a pass is cut into, who runs them, and what lies between the
// passes (softmax, sums, the algebra of the weights). The cut depends on sizes alone, never on the number of threads,
// and partial sums are added in order: the bits do not depend on the number of threads either.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <vector>

#include "passes.h"

namespace rsa {

// A volume (N, C, D, H, W); strides in elements.
struct Volume {
  void* data = nullptr;
  std::array<int64_t, 5> sizes{}, strides{};
};

// What the driver needs of its surroundings.
struct Host {
  // Room for so many elements of the accumulation type, aligned for vectors; it lives as long as the call.
  std::function<void*(int64_t elements)> allocate;
  // Calls body(begin, end) for disjoint parts of [0, count), on several threads.
  std::function<void(int64_t count, const std::function<void(int64_t, int64_t)>& body)> parallel;
  // Which of them this is.
  std::function<int64_t()> thread;
  int64_t threads;
};

// The published weights, matrices (C, C) in row order and vectors (C), in the accumulation type; or their gradients.
struct Weights {
  void *theta_weight, *theta_bias, *phi_weight, *g_weight, *g_bias, *betas;
};

struct Block {
  const Passes& passes;
  Element element;
  const Host& host;
  std::vector<int64_t> axes;
  double scale;
};

// maps: one (N, S, S) per axis. inputs: where the inputs of steps 2, 3, ... go, in the shape of out, or nothing.
void forward(const Block& block, const Volume& x, const Weights& weights, const Volume& out,
             const std::vector<void*>& maps, const std::vector<Volume>& inputs);

// inputs: of steps 2, 3, ...; the first `known` are there, the others are made. work: where gradients are between passes,
// `out` or a volume with strides of its own. out: the gradient of x if `need_x`. Gradients of weights that are not needed
// are left alone.
void backward(const Block& block, const Volume& grad, const Volume& x, const std::vector<Volume>& inputs, int64_t known,
              const std::vector<void*>& maps, const Weights& weights, const Volume& work, const Volume& out,
              bool need_x, bool need_folded, bool need_value, const Weights& grads);

// logits (N, S, S) = <left_i, right_j>
void contract(const Block& block, const Volume& left, const Volume& right, void* logits);

// out = matrix x, or matrix^T x, for every sample's matrix (N, S, S).
void mix(const Block& block, const Volume& x, const void* matrix, bool transposed, const Volume& out);

}  // namespace rsa
