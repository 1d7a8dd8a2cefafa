#include "norm.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "storage.h"

namespace rsa {
namespace {

// Rows of a part at least, and parts of a sample at most: sums of parts are added in order, whoever made them.
constexpr int64_t FEWEST_ROWS = 512, MOST_PARTS = 64;

template <class T>
class Driver {
 public:
  Driver(const GroupNorm& norm, int64_t bytes)
      : norm_(norm),
        bytes_(bytes),
        rows_(std::max(FEWEST_ROWS, (norm.voxels + MOST_PARTS - 1) / MOST_PARTS)),
        parts_((norm.voxels + rows_ - 1) / rows_),
        scale_(norm.samples * norm.channels),
        shift_(scale_.size()),
        minus_(scale_.size()),
        sums_(norm.samples * parts_ * 2 * norm.channels) {}

  void forward(const void* x, double eps, void* out, double* moments) {
    for (int64_t sample = 0; sample < norm_.samples; ++sample) take_first(x, sample);
    each_part([&](int64_t sample, int64_t part, int64_t at, int64_t rows) {
      norm_.passes.norm_sums(norm_.channels, rows, of(x, at), minus_.data() + sample * norm_.channels, sums(sample, part));
    });
    for (int64_t sample = 0; sample < norm_.samples; ++sample) {
      gather(sample);
      find_moments(sample, eps, moments);
    }
    find_affine(moments);
    each_part([&](int64_t sample, int64_t, int64_t at, int64_t rows) {
      const int64_t c = sample * norm_.channels;
      norm_.passes.norm_apply(norm_.channels, rows, of(x, at), scale_.data() + c, shift_.data() + c, norm_.relu,
                              const_cast<void*>(of(out, at)));
    });
  }

  void backward(const void* grad, const void* x, const double* moments, void* out, T* weight_grad, T* bias_grad) {
    find_affine(moments);
    each_channel([&](int64_t at, int64_t, int64_t group) { minus_[at] = as_stored(-moments[group]); });
    each_part([&](int64_t sample, int64_t part, int64_t at, int64_t rows) {
      const int64_t c = sample * norm_.channels;
      norm_.passes.norm_backward_sums(norm_.channels, rows, of(grad, at), of(x, at), scale_.data() + c,
                                      shift_.data() + c, norm_.relu, minus_.data() + c, sums(sample, part));
    });
    std::vector<T> of_x(scale_.size()), rest(scale_.size());
    std::vector<double> weight_sums(norm_.channels), bias_sums(norm_.channels);
    for (int64_t sample = 0; sample < norm_.samples; ++sample) {
      gather(sample);
      find_backward(sample, moments, of_x, rest, weight_sums, bias_sums);
    }
    if (weight_grad) std::copy(weight_sums.begin(), weight_sums.end(), weight_grad);
    if (bias_grad) std::copy(bias_sums.begin(), bias_sums.end(), bias_grad);
    each_part([&](int64_t sample, int64_t, int64_t at, int64_t rows) {
      const int64_t c = sample * norm_.channels;
      norm_.passes.norm_backward(norm_.channels, rows, of(grad, at), of(x, at), scale_.data() + c, shift_.data() + c,
                                 norm_.relu, of_x.data() + c, rest.data() + c, const_cast<void*>(of(out, at)));
    });
  }

 private:
  int64_t width() const { return norm_.channels / norm_.groups; }
  const void* of(const void* data, int64_t row) const {
    return static_cast<const char*>(data) + row * norm_.channels * bytes_;
  }
  // Sums (2, C) of a part; gathered, those of the sample are in the place of its first part.
  double* sums(int64_t sample, int64_t part) { return sums_.data() + (sample * parts_ + part) * 2 * norm_.channels; }
  double weight(int64_t channel) const { return norm_.weight ? static_cast<const T*>(norm_.weight)[channel] : T(1); }

  // Calls body(sample, part, first row of all, rows) on several threads.
  template <class Body>
  void each_part(const Body& body) {
    norm_.host.parallel(norm_.samples * parts_, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t sample = task / parts_, part = task % parts_, row = part * rows_;
        body(sample, part, sample * norm_.voxels + row, std::min(rows_, norm_.voxels - row));
      }
    });
  }

  // Calls body(place in (N, C), channel, place in (N, groups)).
  template <class Body>
  void each_channel(const Body& body) {
    for (int64_t at = 0; at < norm_.samples * norm_.channels; ++at) {
      const int64_t channel = at % norm_.channels;
      body(at, channel, at / norm_.channels * norm_.groups + channel / width());
    }
  }

  // Sums are of differences from a sample's first voxel: a mean far from zero would swallow the variance.
  void take_first(const void* x, int64_t sample) {
    T* minus = minus_.data() + sample * norm_.channels;
    const void* first = of(x, sample * norm_.voxels);
    for (int64_t c = 0; c < norm_.channels; ++c) {
      switch (norm_.element) {
        case Element::kFloat64: minus[c] = widen<T>(static_cast<const double*>(first)[c]); break;
        case Element::kFloat32: minus[c] = widen<T>(static_cast<const float*>(first)[c]); break;
        case Element::kBFloat16: minus[c] = widen<T>(static_cast<const BFloat16*>(first)[c]); break;
        case Element::kFloat16: minus[c] = widen<T>(static_cast<const Float16*>(first)[c]); break;
      }
      minus[c] = -minus[c];
    }
  }

  // In as few bits as the volume has: differences from it are exact then, and what it lacks is added to their sums.
  T as_stored(double value) const {
    if (norm_.element == Element::kBFloat16) {
      BFloat16 stored;
      narrow(static_cast<float>(value), stored);
      return widen<T>(stored);
    }
    if (norm_.element == Element::kFloat16) {
      Float16 stored;
      narrow(static_cast<float>(value), stored);
      return widen<T>(stored);
    }
    return static_cast<T>(value);
  }

  void gather(int64_t sample) {
    double* total = sums(sample, 0);
    for (int64_t part = 1; part < parts_; ++part) {
      const double* more = sums(sample, part);
      for (int64_t i = 0; i < 2 * norm_.channels; ++i) total[i] += more[i];
    }
  }

  void find_moments(int64_t sample, double eps, double* moments) {
    const double *first = sums(sample, 0), *second = first + norm_.channels;
    const T* minus = minus_.data() + sample * norm_.channels;
    const double voxels = static_cast<double>(norm_.voxels);
    for (int64_t group = 0; group < norm_.groups; ++group) {
      const int64_t begin = group * width(), end = begin + width();
      double mean = 0, squares = 0;
      for (int64_t c = begin; c < end; ++c) mean += first[c] / voxels - minus[c];
      mean /= static_cast<double>(width());
      for (int64_t c = begin; c < end; ++c) {
        const double own = first[c] / voxels, apart = own - minus[c] - mean;
        squares += second[c] - own * first[c] + voxels * apart * apart;
      }
      // A NaN stays one: it is not less than zero.
      const double variance = std::max(squares / (voxels * static_cast<double>(width())), 0.0);
      const int64_t at = sample * norm_.groups + group;
      moments[at] = mean;
      moments[norm_.samples * norm_.groups + at] = 1 / std::sqrt(variance + eps);
    }
  }

  // The norm is x scale + shift.
  void find_affine(const double* moments) {
    const double* reciprocals = moments + norm_.samples * norm_.groups;
    each_channel([&](int64_t at, int64_t channel, int64_t group) {
      const double scale = reciprocals[group] * weight(channel);
      scale_[at] = static_cast<T>(scale);
      const double bias = norm_.bias ? static_cast<const T*>(norm_.bias)[channel] : T(0);
      shift_[at] = static_cast<T>(bias - moments[group] * static_cast<double>(scale_[at]));
    });
  }

  // With z the normalised x and g the gradient above, the one of x is (w g - mean(w g) - z mean(w g z)) / deviation.
  void find_backward(int64_t sample, const double* moments, std::vector<T>& of_x, std::vector<T>& rest,
                     std::vector<double>& weight_sums, std::vector<double>& bias_sums) {
    const double* grads = sums(sample, 0);
    double* products = sums(sample, 0) + norm_.channels;
    const double count = static_cast<double>(norm_.voxels) * static_cast<double>(width());
    for (int64_t group = 0; group < norm_.groups; ++group) {
      const int64_t at = sample * norm_.groups + group;
      const double mean = moments[at], reciprocal = moments[norm_.samples * norm_.groups + at];
      double grad = 0, product = 0;
      for (int64_t c = group * width(); c < (group + 1) * width(); ++c) {
        products[c] -= (minus_[sample * norm_.channels + c] + mean) * grads[c];  // see as_stored
        grad += weight(c) * grads[c];
        product += weight(c) * products[c] * reciprocal;
        bias_sums[c] += grads[c];
        weight_sums[c] += products[c] * reciprocal;
      }
      const double slope = -reciprocal * reciprocal * product / count;
      for (int64_t c = group * width(); c < (group + 1) * width(); ++c) {
        of_x[sample * norm_.channels + c] = static_cast<T>(slope);
        rest[sample * norm_.channels + c] = static_cast<T>(-reciprocal * grad / count - slope * mean);
      }
    }
  }

  const GroupNorm& norm_;
  int64_t bytes_, rows_, parts_;
  std::vector<T> scale_, shift_, minus_;
  std::vector<double> sums_;
};

// Calls body(a number of the accumulation type, bytes of an element).
template <class Body>
void with_types(Element element, const Body& body) {
  if (element == Element::kFloat64) return body(double(), sizeof(double));
  body(float(), element == Element::kFloat32 ? sizeof(float) : sizeof(uint16_t));
}

}  // namespace

void group_norm(const GroupNorm& norm, const void* x, double eps, void* out, double* moments) {
  with_types(norm.element, [&](auto number, size_t bytes) {
    using T = decltype(number);
    Driver<T>(norm, static_cast<int64_t>(bytes)).forward(x, eps, out, moments);
  });
}

void group_norm_backward(const GroupNorm& norm, const void* grad, const void* x, const double* moments, void* out,
                         void* weight_grad, void* bias_grad) {
  with_types(norm.element, [&](auto number, size_t bytes) {
    using T = decltype(number);
    Driver<T>(norm, static_cast<int64_t>(bytes))
        .backward(grad, x, moments, out, static_cast<T*>(weight_grad), static_cast<T*>(bias_grad));
  });
}

}  // namespace rsa
