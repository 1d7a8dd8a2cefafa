// The kernels on maps: softmax, its derivative, and the padded copies that products read.
//
// Shapes: partial (N, parts, S, S), attention (N, S, S), padded maps (N, SP, SP) in the volume's type, row_dots (N,
// SP). A program of 256 threads makes one row of a padded map. The parts are summed in a fixed order: groups of
// threads sum every so many-th part, and their sums are added one after the other. Traffic: the partial maps; nothing
// of a volume.
#pragma once

#include "index.cuh"
#include "numbers.cuh"

namespace rsa {

constexpr int map_threads = 256;

template <typename Sum>
constexpr int map_shared = map_threads * static_cast<int>(sizeof(Sum) + sizeof(int64_t));

template <typename T>
struct SoftmaxArguments {
  using Sum = typename Numbers<T>::Sum;
  Sum* partial;  // the first part's rows are overwritten
  Sum* attention;
  T* padded_map;
  Sum factor;  // on the logits
  int64_t slices, parts;
};

template <typename T>
struct PadArguments {
  using Sum = typename Numbers<T>::Sum;
  const Sum* attention;
  T* padded_map;
  int64_t slices;
  bool transposed;
};

template <typename T>
struct SoftmaxBackwardArguments {
  using Sum = typename Numbers<T>::Sum;
  Sum* partial;  // the first part's rows are overwritten
  const Sum* attention;
  const Sum* beta;  // null: one
  T* grad_logits;
  T* grad_logits_transposed;
  Sum* row_dots;
  Sum factor;  // on the logits, and so on their gradient
  int64_t slices, parts;
};

// Combines a number of each thread in a tree of fixed order; every thread gets the result.
template <typename Value, typename Combine>
RSA_DEVICE Value combine_threads(Value value, const Combine& combine) {
  Value* const shared = reinterpret_cast<Value*>(shared_memory());
  const int thread = thread_index();
  shared[thread] = value;
  barrier();
  for (int half = map_threads / 2; half > 0; half /= 2) {
    if (thread < half) shared[thread] = combine(shared[thread], shared[thread + half]);
    barrier();
  }
  const Value result = shared[0];
  barrier();
  return result;
}

template <typename Sum>
RSA_DEVICE Sum add_threads(Sum value) {
  return combine_threads(value, [](Sum a, Sum b) { return a + b; });
}

// Threads side by side in a row: a power of two; the rest of a block forms groups that share the parts.
RSA_SHARED int lanes_of_row(int64_t slices) {
  int lanes = 1;
  while (lanes < slices && lanes < map_threads) lanes *= 2;
  return lanes;
}

// Sums row `row` of a sample's parts; returns where the sums are: in the first part's row.
template <typename Sum>
RSA_DEVICE Sum* sum_parts(Sum* partial, int64_t sample, int64_t row, int64_t slices, int64_t parts) {
  Sum* const shared = reinterpret_cast<Sum*>(shared_memory());
  Sum* const total_row = partial + (sample * parts * slices + row) * slices;
  const int lanes = lanes_of_row(slices), groups = map_threads / lanes;
  const int lane = thread_index() % lanes, group = thread_index() / lanes;
  for (int64_t first = 0; first < slices; first += lanes) {
    const int64_t column = first + lane;
    Sum total = 0;
    if (column < slices) {
      RSA_UNROLL_BY(8)
      for (int64_t part = group; part < parts; part += groups) total += total_row[part * slices * slices + column];
    }
    shared[thread_index()] = total;
    barrier();
    if (group == 0 && column < slices) {
      for (int other = 1; other < groups; ++other) total += shared[other * lanes + lane];
      total_row[column] = total;
    }
    barrier();
  }
  return total_row;
}

template <typename T>
RSA_DEVICE void softmax(const SoftmaxArguments<T>& arguments) {
  using Sum = typename Numbers<T>::Sum;
  const int64_t slices = arguments.slices, padded = padded_slices(slices);
  const int64_t sample = block_index() / padded, row = block_index() % padded;
  const int thread = thread_index();
  T* const padded_row = arguments.padded_map + (sample * padded + row) * padded;
  for (int64_t column = thread; column < padded; column += map_threads) {
    if (row >= slices || column >= slices) padded_row[column] = rounded<T>(Sum(0));
  }
  if (row >= slices) return;

  Sum* const logits = sum_parts(arguments.partial, sample, row, slices, arguments.parts);
  Sum largest = arguments.factor * logits[0];
  for (int64_t column = thread; column < slices; column += map_threads) {
    const Sum logit = arguments.factor * logits[column];
    largest = logit > largest ? logit : largest;
  }
  largest = combine_threads(largest, [](Sum a, Sum b) { return a > b ? a : b; });
  Sum sum = 0;
  for (int64_t column = thread; column < slices; column += map_threads) {
    logits[column] = exponential(arguments.factor * logits[column] - largest);
    sum += logits[column];
  }
  sum = add_threads(sum);
  Sum* const attention_row = arguments.attention + (sample * slices + row) * slices;
  for (int64_t column = thread; column < slices; column += map_threads) {
    const Sum weight = logits[column] / sum;
    attention_row[column] = weight;
    padded_row[column] = rounded<T>(weight);
  }
}

template <typename T>
RSA_DEVICE void pad(const PadArguments<T>& arguments) {
  using Sum = typename Numbers<T>::Sum;
  const int64_t slices = arguments.slices, padded = padded_slices(slices);
  const int64_t sample = block_index() / padded, row = block_index() % padded;
  const Sum* const attention = arguments.attention + sample * slices * slices;
  for (int64_t column = thread_index(); column < padded; column += map_threads) {
    Sum weight = 0;
    if (row < slices && column < slices) {
      weight = attention[arguments.transposed ? column * slices + row : row * slices + column];
    }
    arguments.padded_map[(sample * padded + row) * padded + column] = rounded<T>(weight);
  }
}

// dL = factor * beta * A (D - rowsum(A D)) from the parts of D.
//
// A row of dL sums to zero, which rounding to 16 bits would break; and what it sums to instead is multiplied by the
// volume's mean, which can be large. So what rounding takes from a row is given back to its smallest entry, where
// numbers lie closest.
template <typename T>
RSA_DEVICE void softmax_backward(const SoftmaxBackwardArguments<T>& arguments) {
  using Sum = typename Numbers<T>::Sum;
  const int64_t slices = arguments.slices, padded = padded_slices(slices);
  const int64_t sample = block_index() / padded, row = block_index() % padded;
  const int thread = thread_index();
  T* const grad_map = arguments.grad_logits + sample * padded * padded;
  T* const transposed_map = arguments.grad_logits_transposed + sample * padded * padded;
  const auto put = [&](int64_t column, Sum value) {
    grad_map[row * padded + column] = transposed_map[column * padded + row] = rounded<T>(value);
  };
  for (int64_t column = thread; column < padded; column += map_threads) {
    if (row >= slices || column >= slices) put(column, Sum(0));
  }
  if (row >= slices) {
    if (thread == 0) arguments.row_dots[sample * padded + row] = Sum(0);
    return;
  }

  Sum* const grads = sum_parts(arguments.partial, sample, row, slices, arguments.parts);
  const Sum* const attention = arguments.attention + (sample * slices + row) * slices;
  Sum row_dot = 0;
  for (int64_t column = thread; column < slices; column += map_threads) row_dot += attention[column] * grads[column];
  row_dot = add_threads(row_dot);
  if (thread == 0) arguments.row_dots[sample * padded + row] = row_dot;

  const Sum factor = arguments.beta ? arguments.factor * *arguments.beta : arguments.factor;
  Sum lost = 0;
  for (int64_t column = thread; column < slices; column += map_threads) {
    grads[column] = factor * (attention[column] * (grads[column] - row_dot));
    lost += grads[column] - widen(rounded<T>(grads[column]));
  }
  if constexpr (sizeof(T) == 2) {
    struct Smallest {
      Sum size;
      int column;
    };
    lost = add_threads(lost);
    const auto size_of = [&](int64_t column) { return grads[column] < 0 ? -grads[column] : grads[column]; };
    Smallest smallest{size_of(thread < slices ? thread : 0), static_cast<int>(thread < slices ? thread : 0)};
    for (int64_t column = thread; column < slices; column += map_threads) {
      if (size_of(column) < smallest.size) smallest = {size_of(column), static_cast<int>(column)};
    }
    smallest = combine_threads(smallest, [](Smallest a, Smallest b) {
      return b.size < a.size || (b.size == a.size && b.column < a.column) ? b : a;
    });
    for (int64_t column = thread; column < slices; column += map_threads) {
      put(column, column == smallest.column ? grads[column] + lost : grads[column]);
    }
  } else {
    for (int64_t column = thread; column < slices; column += map_threads) put(column, grads[column]);
  }
}

}  // namespace rsa
