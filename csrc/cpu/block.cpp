#include "block.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "passes.h"
#if defined(RSA_X86)
#include <xmmintrin.h>
#endif

namespace rsa {
namespace {

// Multiply-adds below which a pass is not shared between threads, and parts that it is cut into at most.
constexpr int64_t SERIAL = 1 << 20;
constexpr int64_t PARTS = 32;
// Bytes of partial gradients of the weights that a block may take, and parts that it gets in any case.
constexpr int64_t PARTIAL_GRADIENTS = 4 << 20;
constexpr int64_t FEWEST_PARTS = 4;

// One step of the block: the volume as slices along an axis, and its cut.
struct Step {
  int64_t batch, channels, slices, outer_size, inner_size;
  int axis, outer, inner;
  int64_t tile;
  // Ranges of positions of a sample; a part is a run of ranges.
  struct Task {
    int64_t sample, begin, end;
  };
  std::vector<Task> tasks;
  int64_t parts;

  Step(const Passes& passes, const Volume& x, int64_t along, int64_t most_parts)
      : batch(x.sizes[0]), channels(x.sizes[1]), slices(x.sizes[along]), axis(static_cast<int>(along)) {
    outer = axis == 2 ? 3 : 2;
    inner = axis == 4 ? 3 : 4;
    if (x.strides[outer] < x.strides[inner]) std::swap(outer, inner);
    outer_size = x.sizes[outer];
    inner_size = x.sizes[inner];
    tile = passes.tile_positions(slices, channels);
    const int64_t positions = outer_size * inner_size;
    const bool serial = batch * positions * slices * channels < SERIAL / (channels + slices);
    const int64_t fitting = std::min(most_parts, batch * ((positions + tile - 1) / tile));
    parts = 1;
    while (!serial && 2 * parts <= fitting) parts *= 2;
    // Between whole lines of memory, where a range has some.
    const int64_t unit = tile >= LINE ? LINE : 1, units = (positions + unit - 1) / unit;
    const int64_t cuts = std::min(units, (parts + batch - 1) / batch);
    const auto edge = [&](int64_t cut) { return std::min(positions, units * cut / cuts * unit); };
    for (int64_t sample = 0; sample < batch; ++sample) {
      for (int64_t cut = 0; cut < cuts; ++cut) tasks.push_back({sample, edge(cut), edge(cut + 1)});
    }
    parts = std::min<int64_t>(parts, tasks.size());
  }

  int64_t cuts() const { return static_cast<int64_t>(tasks.size()) / batch; }
  int64_t scratch(const Passes& passes, bool backward) const {
    return passes.scratch_elements(slices, channels, tile, backward);
  }
  Range range(const Task& task) const { return {slices, channels, inner_size, task.begin, task.end, tile}; }
  View view(const Volume& volume, int64_t sample, int64_t bytes) const {
    const auto& strides = volume.strides;
    return {static_cast<char*>(volume.data) + sample * strides[0] * bytes, strides[axis], strides[outer],
            strides[inner], strides[1]};
  }
};

// Numbers below 2^-126 (float64: 2^-1022) count as zero on this thread while it lives. Maps are full of them where their
// logits are large, and each costs some processors a hundred cycles in every product.
class WithoutSubnormals {
 public:
#if defined(RSA_X86)
  WithoutSubnormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | FLUSH_RESULTS | FLUSH_OPERANDS); }
  ~WithoutSubnormals() { _mm_setcsr(before_); }
  WithoutSubnormals(const WithoutSubnormals&) = delete;
  WithoutSubnormals& operator=(const WithoutSubnormals&) = delete;

 private:
  static constexpr unsigned FLUSH_RESULTS = 0x8000, FLUSH_OPERANDS = 0x40;
  const unsigned before_;
#endif
};

int64_t stored_bytes(Element element) {
  return element == Element::kFloat64 ? 8 : element == Element::kFloat32 ? 4 : 2;
}

// The driver, for one accumulation type.
template <class T>
class Driver {
 public:
  explicit Driver(const Block& block)
      : block_(block), passes_(block.passes), host_(block.host), bytes_(stored_bytes(block.element)) {}

  void forward(const Volume& x, const Weights& weights, const Volume& out, const std::vector<void*>& maps,
               const std::vector<Volume>& inputs) {
    const int64_t channels = x.sizes[1];
    read_m_ = prepared(channels, fold(channels, weights), true);
    read_value_ = prepared(channels, packed(channels, weights.g_weight, true), false);
    const T* betas = static_cast<const T*>(weights.betas);
    const auto steps = cut(x, PARTS, false);
    const Volume* from = &x;
    for (size_t s = 0; s < steps.size(); ++s) {
      const Volume& to = s < inputs.size() ? inputs[s] : out;
      T* attention = attention_map(steps[s], *from, static_cast<T*>(maps[s]), betas[s]);
      mix_step(steps[s], *from, attention, static_cast<const T*>(weights.g_bias), betas[s], to);
      from = &to;
    }
  }

  void backward(const Volume& grad, const Volume& x, const std::vector<Volume>& inputs, int64_t known,
                const std::vector<void*>& maps, const Weights& weights, const Volume& work, const Volume& out,
                bool need_x, bool need_folded, bool need_value, const Weights& grads) {
    const int64_t channels = x.sizes[1], panels = passes_.panel_elements(channels), padded = panels / channels;
    T* m = fold(channels, weights);
    T* read_m_transposed = prepared(channels, transposed(channels, m), false);
    read_m_ = prepared(channels, m, true);
    T* read_value_transposed = prepared(channels, packed(channels, weights.g_weight, false), false);

    const int64_t affordable = PARTIAL_GRADIENTS / (2 * panels * static_cast<int64_t>(sizeof(T)));
    const auto steps = cut(x, std::clamp(affordable, FEWEST_PARTS, PARTS), true);
    int64_t parts = 1;
    for (const Step& step : steps) parts = std::max(parts, step.parts);
    // Sums of each part: over all steps, but for those of the gradient, which have a beta of their own.
    Sums folded(parts, need_folded ? panels : 0), value(parts, need_value ? panels : 0);
    for (Sums* sums : {&folded, &value}) {
      const int64_t count = parts * sums->size;
      if (!count) continue;
      sums->data = room(count);
      elements(count, count, [&](int64_t begin, int64_t end) { std::fill(sums->data + begin, sums->data + end, T(0)); });
    }
    std::vector<double> u_grad(parts * padded), g_bias_grad(channels);

    const T* betas = static_cast<const T*>(weights.betas);
    for (size_t s = known; s + 1 < steps.size(); ++s) {
      if (!read_value_) read_value_ = prepared(channels, packed(channels, weights.g_weight, true), false);
      const Volume& from = s == 0 ? x : inputs[s - 1];
      T* attention = scaled_map(steps[s], static_cast<const T*>(maps[s]), betas[s]);
      mix_step(steps[s], from, attention, static_cast<const T*>(weights.g_bias), betas[s], inputs[s]);
    }

    for (size_t s = steps.size(); s-- > 0;) {
      const Step& step = steps[s];
      const Volume& from = s == 0 ? x : inputs[s - 1];
      const Volume& above = s + 1 == steps.size() ? grad : work;
      Volume below = work;
      if (s == 0 && !need_x) below.data = nullptr;
      const T* attention = scaled_map(step, static_cast<const T*>(maps[s]), betas[s]);
      const int64_t square = step.slices * step.slices;
      std::vector<double> products(step.tasks.size() * square);
      std::vector<double> grad_sums(step.parts * padded);
      run(step, [&](int64_t part, int64_t index, const Step::Task& task, void* scratch) {
        passes_.map_backward(step.range(task), step.view(from, task.sample, bytes_),
                             step.view(above, task.sample, bytes_), attention + task.sample * square, read_value_transposed,
                             products.data() + index * square, grad_sums.data() + part * padded, value.of(part),
                             below.data ? step.view(below, task.sample, bytes_) : View{}, scratch);
      });

      T* column = room(step.batch * step.slices);
      double grad_beta = 0;
      T* grad_logits = softmax_backward(step, products, static_cast<const T*>(maps[s]), betas[s], column, grad_beta);
      for (int64_t c = 0; c < channels; ++c) {
        double sum = 0;
        for (int64_t part = 0; part < step.parts; ++part) sum += grad_sums[part * padded + c];
        grad_beta += static_cast<const T*>(weights.g_bias)[c] * sum;
        g_bias_grad[c] += betas[s] * sum;
      }
      static_cast<T*>(grads.betas)[s] = static_cast<T>(grad_beta);
      if (!below.data && !need_folded) continue;
      run(step, [&](int64_t part, int64_t, const Step::Task& task, void* scratch) {
        const View partial = below.data ? step.view(below, task.sample, bytes_) : View{};
        const View target = below.data && s == 0 ? step.view(out, task.sample, bytes_) : partial;
        passes_.mix_backward(step.range(task), step.view(from, task.sample, bytes_), partial,
                             grad_logits + task.sample * square, column + task.sample * step.slices, read_m_, read_m_transposed,
                             u_, folded.of(part), u_grad.data() + part * padded, target, scratch);
      });
    }

    for (T* done : {read_m_, read_value_, read_m_transposed, read_value_transposed}) give_back(done);
    for (int64_t c = 0; c < channels; ++c) static_cast<T*>(grads.g_bias)[c] = static_cast<T>(g_bias_grad[c]);
    if (need_value) unpack(channels, total(value, 1), grads.g_weight);
    if (need_folded) unfold(channels, weights, total(folded, block_.scale), u_grad, padded, grads);
  }

  void contract(const Volume& left, const Volume& right, T* logits) {
    const Step step = cut(left, PARTS, true)[0];
    const int64_t square = step.slices * step.slices;
    std::vector<double> partial(step.tasks.size() * square);
    run(step, [&](int64_t, int64_t index, const Step::Task& task, void* scratch) {
      passes_.contract(step.range(task), step.view(left, task.sample, bytes_), step.view(right, task.sample, bytes_),
                       partial.data() + index * square, scratch);
    });
    rows_of_maps(step, [&](int64_t row, std::vector<double>& sums) {
      add_partial(step, partial, row, sums);
      for (int64_t j = 0; j < step.slices; ++j) logits[row * step.slices + j] = static_cast<T>(sums[j]);
    });
  }

  void mix(const Volume& x, const T* matrix, bool transposed, const Volume& out) {
    const Step step = cut(x, PARTS, false)[0];
    run(step, [&](int64_t, int64_t, const Step::Task& task, void* scratch) {
      passes_.mix_slices(step.range(task), step.view(x, task.sample, bytes_),
                         matrix + task.sample * step.slices * step.slices, transposed,
                         step.view(out, task.sample, bytes_), scratch);
    });
  }

 private:
  // A sum of each part, side by side; of nothing where the size is zero.
  struct Sums {
    int64_t parts, size;
    T* data = nullptr;
    Sums(int64_t parts, int64_t size) : parts(parts), size(size) {}
    T* of(int64_t part) const { return size ? data + part * size : nullptr; }
  };

  T* room(int64_t elements) { return static_cast<T*>(host_.allocate(elements)); }

  T* zeros(int64_t elements) {
    T* result = room(elements);
    std::memset(result, 0, elements * sizeof(T));
    return result;
  }

  // Room for a matrix (C, C) in whatever form; what is given back serves again.
  T* matrix(int64_t channels) {
    if (free_.empty()) {
      const int64_t prepared = passes_.prepare ? passes_.prepared_elements(channels, true) : 0;
      return room(std::max(passes_.panel_elements(channels), prepared));
    }
    T* const taken = free_.back();
    free_.pop_back();
    return taken;
  }
  void give_back(T* matrix) {
    if (matrix) free_.push_back(matrix);
  }

  T* packed(int64_t channels, const void* rows, bool transposed) {
    T* panels = matrix(channels);
    rows_of_matrix(channels, [&](int64_t begin, int64_t end) {
      passes_.pack_matrix(channels, begin, end, rows, transposed, panels);
    });
    return panels;
  }

  void unpack(int64_t channels, const T* panels, void* rows) {
    rows_of_matrix(channels, [&](int64_t begin, int64_t end) {
      passes_.unpack_matrix(channels, begin, end, panels, rows);
    });
  }

  // The transpose of a matrix in panels.
  T* transposed(int64_t channels, const T* panels) {
    T* rows = matrix(channels);
    unpack(channels, panels, rows);
    T* result = packed(channels, rows, true);
    give_back(rows);
    return result;
  }

  // Panels as the passes read them, in whose place they are.
  T* prepared(int64_t channels, T* panels, bool split) {
    if (!passes_.prepare) return panels;
    T* to = matrix(channels);
    rows_of_matrix(channels, [&](int64_t begin, int64_t end) {
      passes_.prepare(channels, begin, end, panels, split, to);
    });
    give_back(panels);
    return to;
  }

  // The steps of the block, and one room for the scratch of them all. `backward` says that passes read two volumes.
  std::vector<Step> cut(const Volume& x, int64_t most_parts, bool backward) {
    std::vector<Step> steps;
    int64_t most = 0;
    for (const int64_t axis : block_.axes) {
      steps.emplace_back(passes_, x, axis, most_parts);
      most = std::max(most, steps.back().scratch(passes_, backward));
    }
    scratch_elements_ = most;
    scratch_ = room(most * host_.threads);
    return steps;
  }

  // Calls body(part, task's index, task, scratch) for every task, those of a part one after the other.
  template <class Body>
  void run(const Step& step, const Body& body) {
    const int64_t count = step.tasks.size(), threads = std::min(host_.threads, step.parts);
    const auto parts = [&](int64_t begin, int64_t end) {
      const WithoutSubnormals mode;
      T* scratch = scratch_ + host_.thread() * scratch_elements_;
      for (int64_t part = begin; part < end; ++part) {
        for (int64_t index = count * part / step.parts; index < count * (part + 1) / step.parts; ++index) {
          body(part, index, step.tasks[index], scratch);
        }
      }
    };
    if (threads == 1) {
      parts(0, step.parts);
    } else {
      host_.parallel(step.parts, parts);
    }
  }

  // Calls body(row, room for a row in double) for the rows of all maps, `sample * S + i`.
  template <class Body>
  void rows_of_maps(const Step& step, const Body& body) {
    const int64_t rows = step.batch * step.slices;
    const auto some = [&](int64_t begin, int64_t end) {
      std::vector<double> sums(step.slices);
      for (int64_t row = begin; row < end; ++row) body(row, sums);
    };
    // A row costs about ten operations an entry and one for every partial sum.
    if (rows * step.slices * (10 + step.cuts()) < SERIAL / 16) {
      some(0, rows);
    } else {
      host_.parallel(rows, some);
    }
  }

  void add_partial(const Step& step, const std::vector<double>& partial, int64_t row, std::vector<double>& sums) {
    const int64_t sample = row / step.slices, i = row % step.slices, square = step.slices * step.slices;
    std::fill(sums.begin(), sums.end(), 0.0);
    for (int64_t cut = 0; cut < step.cuts(); ++cut) {
      const double* from = partial.data() + (sample * step.cuts() + cut) * square + i * step.slices;
      for (int64_t j = 0; j < step.slices; ++j) sums[j] += from[j];
    }
  }

  // Fills the map of a step, and returns beta times it.
  T* attention_map(const Step& step, const Volume& x, T* map, T beta) {
    const int64_t square = step.slices * step.slices;
    std::vector<double> partial(step.tasks.size() * square);
    run(step, [&](int64_t, int64_t index, const Step::Task& task, void* scratch) {
      passes_.map(step.range(task), step.view(x, task.sample, bytes_), read_m_, u_, partial.data() + index * square, scratch);
    });
    T* scaled = room(step.batch * square);
    rows_of_maps(step, [&](int64_t row, std::vector<double>& sums) {
      add_partial(step, partial, row, sums);
      // The logits are of the accumulation type, as everywhere; a NaN stays one.
      T largest = static_cast<T>(sums[0]);
      for (int64_t j = 1; j < step.slices; ++j) largest = std::max(largest, static_cast<T>(sums[j]));
      double total = 0;
      T* out = map + row * step.slices;
      for (int64_t j = 0; j < step.slices; ++j) {
        out[j] = std::exp(static_cast<T>(sums[j]) - largest);
        total += out[j];
      }
      for (int64_t j = 0; j < step.slices; ++j) {
        out[j] = static_cast<T>(out[j] / total);
        scaled[row * step.slices + j] = beta * out[j];
      }
    });
    return scaled;
  }

  T* scaled_map(const Step& step, const T* map, T beta) {
    const int64_t count = step.batch * step.slices * step.slices;
    T* scaled = room(count);
    for (int64_t i = 0; i < count; ++i) scaled[i] = beta * map[i];
    return scaled;
  }

  // The gradient of the logits from D = <Wv^T G, x>, the sums of its columns, and sum(A D).
  T* softmax_backward(const Step& step, const std::vector<double>& partial, const T* map, T beta, T* column, double& grad_beta) {
    const int64_t slices = step.slices, rows = step.batch * slices;
    T* grad_logits = room(rows * slices);
    std::vector<double> dots(rows);
    rows_of_maps(step, [&](int64_t row, std::vector<double>& sums) {
      add_partial(step, partial, row, sums);
      const T* attention = map + row * slices;
      double dot = 0;
      for (int64_t j = 0; j < slices; ++j) dot += attention[j] * sums[j];
      for (int64_t j = 0; j < slices; ++j) {
        grad_logits[row * slices + j] = static_cast<T>(beta * attention[j] * (sums[j] - dot));
      }
      dots[row] = dot;
    });
    for (const double dot : dots) grad_beta += dot;
    std::vector<double> sums(slices);
    for (int64_t sample = 0; sample < step.batch; ++sample) {
      std::fill(sums.begin(), sums.end(), 0.0);
      for (int64_t i = 0; i < slices; ++i) {
        for (int64_t j = 0; j < slices; ++j) sums[j] += grad_logits[(sample * slices + i) * slices + j];
      }
      for (int64_t j = 0; j < slices; ++j) column[sample * slices + j] = static_cast<T>(sums[j]);
    }
    return grad_logits;
  }

  void mix_step(const Step& step, const Volume& x, const T* attention, const T* g_bias, T beta, const Volume& out) {
    for (int64_t c = 0; c < step.channels; ++c) bias_[c] = beta * g_bias[c];
    const int64_t square = step.slices * step.slices;
    run(step, [&](int64_t, int64_t, const Step::Task& task, void* scratch) {
      passes_.mix(step.range(task), step.view(x, task.sample, bytes_), attention + task.sample * square, read_value_, bias_,
                  step.view(out, task.sample, bytes_), scratch);
    });
  }

  // Some of `count` elements, on all threads if that reads or writes many.
  template <class Body>
  void elements(int64_t count, int64_t touched, const Body& body) {
    if (touched < SERIAL / 16) {
      body(0, count);
    } else {
      host_.parallel(count, body);
    }
  }

  // Rows of a product of two (C, C) matrices, on all threads if they are large.
  template <class Body>
  void rows_of_matrix(int64_t channels, const Body& body) {
    if (channels * channels * channels < SERIAL) {
      body(0, channels);
    } else {
      constexpr int64_t ROWS = 16;
      host_.parallel((channels + ROWS - 1) / ROWS, [&](int64_t begin, int64_t end) {
        body(begin * ROWS, std::min(channels, end * ROWS));
      });
    }
  }

  // M = scale theta^T phi, and u = scale phi^T theta_bias.
  T* fold(int64_t channels, const Weights& weights) {
    const int64_t panels = passes_.panel_elements(channels), padded = panels / channels;
    u_ = zeros(padded);
    bias_ = zeros(padded);
    T* theta = packed(channels, weights.theta_weight, false);
    T* phi_panels = packed(channels, weights.phi_weight, false);
    T* m = matrix(channels);
    std::memset(m, 0, panels * sizeof(T));
    rows_of_matrix(channels, [&](int64_t begin, int64_t end) {
      passes_.correlate(channels, begin, end, theta, phi_panels, m);
    });
    give_back(theta);
    give_back(phi_panels);
    const T scale = static_cast<T>(block_.scale);
    elements(panels, panels, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) m[i] *= scale;
    });
    const T *phi = static_cast<const T*>(weights.phi_weight), *bias = static_cast<const T*>(weights.theta_bias);
    std::vector<double> u(channels);
    rows_of_matrix(channels, [&](int64_t begin, int64_t end) {
      for (int64_t row = 0; row < channels; ++row) {
        for (int64_t c = begin; c < end; ++c) u[c] += static_cast<double>(bias[row]) * phi[row * channels + c];
      }
    });
    for (int64_t c = 0; c < channels; ++c) u_[c] = static_cast<T>(block_.scale * u[c]);
    return m;
  }

  // The sum of all parts times `scale`, in the place of the first.
  T* total(const Sums& sums, double scale) {
    elements(sums.size, sums.parts * sums.size, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        double sum = sums.data[i];
        for (int64_t part = 1; part < sums.parts; ++part) sum += sums.data[part * sums.size + i];
        sums.data[i] = static_cast<T>(scale * sum);
      }
    });
    return sums.data;
  }

  // Gradients of theta and phi from those of M and u: d theta = phi dM^T, d phi = theta dM + theta_bias du^T,
  // d theta_bias = phi du. The gradient of M comes with its scale.
  void unfold(int64_t channels, const Weights& weights, T* m_grad, const std::vector<double>& partial_u, int64_t padded,
              const Weights& grads) {
    std::vector<double> u_grad(channels);
    for (size_t at = 0; at < partial_u.size(); at += padded) {
      for (int64_t c = 0; c < channels; ++c) u_grad[c] += block_.scale * partial_u[at + c];
    }
    // d theta, then d phi: rows (C, C) times panels.
    const auto product_of = [&](const void* rows, const T* right, void* to) {
      T *left = packed(channels, rows, false), *product = matrix(channels);
      rows_of_matrix(channels, [&](int64_t begin, int64_t end) {
        passes_.project(channels, begin, end, left, right, product);
      });
      unpack(channels, product, to);
      give_back(left);
      give_back(product);
    };
    T* m_grad_transposed = transposed(channels, m_grad);
    product_of(weights.phi_weight, m_grad_transposed, grads.theta_weight);
    product_of(weights.theta_weight, m_grad, grads.phi_weight);
    T* phi_grad = static_cast<T*>(grads.phi_weight);
    const T *phi = static_cast<const T*>(weights.phi_weight), *bias = static_cast<const T*>(weights.theta_bias);
    rows_of_matrix(channels, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        double sum = 0;
        for (int64_t c = 0; c < channels; ++c) {
          phi_grad[row * channels + c] += static_cast<T>(bias[row] * u_grad[c]);
          sum += phi[row * channels + c] * u_grad[c];
        }
        static_cast<T*>(grads.theta_bias)[row] = static_cast<T>(sum);
      }
    });
  }

  const Block& block_;
  const Passes& passes_;
  const Host& host_;
  const int64_t bytes_;
  T *u_ = nullptr, *bias_ = nullptr;
  // M and the value projection as the passes read them.
  T *read_m_ = nullptr, *read_value_ = nullptr;
  std::vector<T*> free_;
  T* scratch_ = nullptr;
  int64_t scratch_elements_ = 0;
};

template <class Call>
void with_driver(const Block& block, const Call& call) {
  if (block.element == Element::kFloat64) {
    Driver<double> driver(block);
    call(driver, double());
  } else {
    Driver<float> driver(block);
    call(driver, float());
  }
}

}  // namespace

void forward(const Block& block, const Volume& x, const Weights& weights, const Volume& out,
             const std::vector<void*>& maps, const std::vector<Volume>& inputs) {
  with_driver(block, [&](auto& driver, auto) { driver.forward(x, weights, out, maps, inputs); });
}

void backward(const Block& block, const Volume& grad, const Volume& x, const std::vector<Volume>& inputs, int64_t known,
              const std::vector<void*>& maps, const Weights& weights, const Volume& work, const Volume& out,
              bool need_x, bool need_folded, bool need_value, const Weights& grads) {
  with_driver(block, [&](auto& driver, auto) {
    driver.backward(grad, x, inputs, known, maps, weights, work, out, need_x, need_folded, need_value, grads);
  });
}

void contract(const Block& block, const Volume& left, const Volume& right, void* logits) {
  with_driver(block, [&](auto& driver, auto type) {
    driver.contract(left, right, static_cast<decltype(type)*>(logits));
  });
}

void mix(const Block& block, const Volume& x, const void* matrix, bool transposed, const Volume& out) {
  with_driver(block, [&](auto& driver, auto type) {
    driver.mix(x, static_cast<const decltype(type)*>(matrix), transposed, out);
  });
}

}  // namespace rsa
