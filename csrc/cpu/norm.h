// Group norm of a volume whose channels are neighbours in memory, (N, voxels, C), and a ReLU after it if asked for. The
// bits depend neither on the run nor on the number of threads.
#pragma once

#include "block.h"

namespace rsa {

struct GroupNorm {
  const Passes& passes;
  Element element;
  const Host& host;
  int64_t samples, voxels, channels, groups;
  // (C) each in the accumulation type, or null for ones and zeros.
  const void *weight, *bias;
  bool relu;
};

// moments (2, N, groups): mean and reciprocal standard deviation. out may be x.
void group_norm(const GroupNorm& norm, const void* x, double eps, void* out, double* moments);

// The gradient of x, and with weights those of them; out may be grad.
void group_norm_backward(const GroupNorm& norm, const void* grad, const void* x, const double* moments, void* out,
                         void* weight_grad, void* bias_grad);

}  // namespace rsa
