// The C++ kernels without torch, for sanitizers: `python tests/cpp/sanitize.py` compiles this with csrc/cpu and runs it.
//
// Torch's threads are libgomp's or its own, and neither is compiled for a thread sanitizer: it would report races where
// those synchronise, and see none across them. Here every chunk is a std::thread, whose start and end it knows.
// Memory is of the exact size, for an address sanitizer, and holds NaN before it is written: what is read before, or lies
// between the elements of a volume, spoils the results. They must be finite, and the same bits for any number of threads.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "block.h"
#include "processor.h"

namespace {

using rsa::Element;
using rsa::Volume;
using Bits = std::vector<unsigned char>;

constexpr unsigned char UNTOUCHED = 0xff;  // NaN in every type

[[noreturn]] void fail(const std::string& sentence) {
  std::printf("FAIL %s\n", sentence.c_str());
  std::fflush(stdout);
  std::_Exit(1);
}

// Memory ------------------------------------------------------------------------------------------------------------

// On the heap an address sanitizer knows both ends. It does not know loads and stores with a mask, which compilers take
// for calls: they end the program on the page behind guarded memory, if their mask lets them reach it.
enum class Place { kHeap, kGuarded };

class Memory {
 public:
  explicit Memory(Place place) : place_(place) {}
  Memory(const Memory&) = delete;
  ~Memory() {
    for (void* start : heap_) std::free(start);
    for (const auto& [start, size] : pages_) munmap(start, size);
  }

  void* take(size_t bytes, size_t alignment) {
    void* start = nullptr;
    if (place_ == Place::kHeap) {
      if (posix_memalign(&start, 64, bytes)) fail("there is not enough memory");
      heap_.push_back(start);
    } else {
      const size_t page = sysconf(_SC_PAGESIZE), room = (bytes + alignment + page - 1) / page * page;
      start = mmap(nullptr, room + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (start == MAP_FAILED) fail("there is not enough memory");
      pages_.emplace_back(start, room + page);
      if (mprotect(static_cast<char*>(start) + room, page, PROT_NONE)) fail("a page cannot be guarded");
      start = static_cast<char*>(start) + room - (bytes + alignment - 1) / alignment * alignment;
    }
    return std::memset(start, UNTOUCHED, bytes);
  }

 private:
  Place place_;
  std::vector<void*> heap_;
  std::vector<std::pair<void*, size_t>> pages_;
};

// Elements ----------------------------------------------------------------------------------------------------------

const char* name_of(Element element) {
  return element == Element::kFloat64 ? "float64" : element == Element::kFloat32 ? "float32" : "bfloat16";
}

size_t bytes_of(Element element) {
  return element == Element::kFloat64 ? sizeof(double) : element == Element::kFloat32 ? sizeof(float) : 2;
}

Element accumulation(Element element) { return element == Element::kFloat64 ? element : Element::kFloat32; }

void store(Element element, void* data, int64_t index, double value) {
  char* to = static_cast<char*>(data) + index * static_cast<int64_t>(bytes_of(element));
  const float rounded = static_cast<float>(value);
  if (element == Element::kFloat64) {
    std::memcpy(to, &value, sizeof value);
  } else if (element == Element::kFloat32) {
    std::memcpy(to, &rounded, sizeof rounded);
  } else {
    uint32_t bits;
    std::memcpy(&bits, &rounded, sizeof bits);
    const uint16_t upper = static_cast<uint16_t>(bits >> 16);
    std::memcpy(to, &upper, sizeof upper);
  }
}

// Moves an element from `data` to the end of `bits`, and leaves it untouched.
void take_out(Element element, void* data, int64_t index, Bits& bits) {
  unsigned char* from = static_cast<unsigned char*>(data) + index * static_cast<int64_t>(bytes_of(element));
  double value = 0;
  float narrow = 0;
  uint32_t word = 0;
  if (element == Element::kFloat64) {
    std::memcpy(&value, from, sizeof value);
  } else {
    std::memcpy(reinterpret_cast<char*>(&word) + (4 - bytes_of(element)), from, bytes_of(element));  // little endian
    std::memcpy(&narrow, &word, sizeof narrow);
    value = narrow;
  }
  if (!std::isfinite(value)) fail("a result is not finite");
  bits.insert(bits.end(), from, from + bytes_of(element));
  std::memset(from, UNTOUCHED, bytes_of(element));
}

// Between -1 and 1, the same for the same seed and index.
double random_value(uint64_t seed, uint64_t index) {
  uint64_t mixed = (seed + 1) * 0x9e3779b97f4a7c15u + index * 0xbf58476d1ce4e5b9u;
  mixed = (mixed ^ mixed >> 30) * 0x94d049bb133111ebu;
  mixed ^= mixed >> 31;
  return static_cast<double>(mixed >> 11) / static_cast<double>(uint64_t{1} << 52) - 1;
}

// Contiguous values of the accumulation type.
void* values(Memory& memory, Element element, int64_t count) {
  return memory.take(count * bytes_of(accumulation(element)), bytes_of(accumulation(element)));
}

void* random_values(Memory& memory, Element element, int64_t count, uint64_t seed, double size) {
  void* data = values(memory, element, count);
  for (int64_t i = 0; i < count; ++i) store(accumulation(element), data, i, size * random_value(seed, i));
  return data;
}

void take_out_all(Element element, void* data, int64_t count, Bits& bits) {
  for (int64_t i = 0; i < count; ++i) take_out(accumulation(element), data, i, bits);
}

// Volumes -----------------------------------------------------------------------------------------------------------

using Sizes = std::array<int64_t, 5>;

// Dimensions from the slowest to the fastest, and the stride of the fastest; 0: all elements are one.
struct Layout {
  std::array<int, 5> order;
  int64_t step;
};

constexpr Layout CHANNELS_FIRST{{0, 1, 2, 3, 4}, 1}, CHANNELS_LAST{{0, 2, 3, 4, 1}, 1};
constexpr Layout TURNED{{0, 3, 1, 4, 2}, 1}, EVERY_THIRD{{0, 1, 2, 3, 4}, 3}, EXPANDED{{0, 1, 2, 3, 4}, 0};

int64_t span_of(const Volume& volume) {
  int64_t last = 0;
  for (int dim = 0; dim < 5; ++dim) last += (volume.sizes[dim] - 1) * volume.strides[dim];
  return last + 1;
}

template <class Visit>
void each_element(const Volume& volume, const Visit& visit) {
  const auto& [n, c, d, h, w] = volume.sizes;
  for (int64_t i = 0; i < n * c * d * h * w; ++i) {
    int64_t left = i, at = 0;
    for (int dim = 4; dim >= 0; --dim) {
      at += left % volume.sizes[dim] * volume.strides[dim];
      left /= volume.sizes[dim];
    }
    visit(i, at);
  }
}

Volume empty_volume(Memory& memory, Element element, const Sizes& sizes, const Layout& layout) {
  Volume volume;
  volume.sizes = sizes;
  int64_t stride = layout.step;
  for (int i = 4; i >= 0; --i) {
    volume.strides[layout.order[i]] = stride;
    stride *= sizes[layout.order[i]];
  }
  volume.data = memory.take(span_of(volume) * bytes_of(element), bytes_of(element));
  return volume;
}

Volume random_volume(Memory& memory, Element element, const Sizes& sizes, const Layout& layout, uint64_t seed) {
  const Volume volume = empty_volume(memory, element, sizes, layout);
  each_element(volume, [&](int64_t i, int64_t at) { store(element, volume.data, at, random_value(seed, i)); });
  return volume;
}

void take_out_volume(Element element, const Volume& volume, Bits& bits) {
  each_element(volume, [&](int64_t, int64_t at) { take_out(element, volume.data, at, bits); });
  const unsigned char* data = static_cast<const unsigned char*>(volume.data);
  const bool untouched = std::all_of(data, data + span_of(volume) * bytes_of(element),
                                     [](unsigned char byte) { return byte == UNTOUCHED; });
  if (!untouched) fail("something was written between the elements of a volume");
}

// Threads -----------------------------------------------------------------------------------------------------------

thread_local int64_t thread_index = 0;

class ThreadHost {
 public:
  ThreadHost(int64_t threads, Memory& memory, Element element) {
    host.threads = threads;
    host.allocate = [&memory, element](int64_t count) {
      return memory.take(count * bytes_of(accumulation(element)), 64);
    };
    host.thread = [] { return thread_index; };
    host.parallel = [this](int64_t count, const std::function<void(int64_t, int64_t)>& body) {
      const int64_t chunks = std::min(count, host.threads);
      std::vector<std::thread> started;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        started.emplace_back([&body, count, chunks, chunk] {
          thread_index = chunk;
          body(count * chunk / chunks, count * (chunk + 1) / chunks);
        });
      }
      for (std::thread& thread : started) thread.join();
      most_chunks = std::max(most_chunks, chunks);
    };
  }
  ThreadHost(const ThreadHost&) = delete;
  rsa::Host host;
  int64_t most_chunks = 0;
};

// Cases -------------------------------------------------------------------------------------------------------------

struct Case {
  const char* description;
  Sizes sizes;
  std::vector<int64_t> axes;
  Layout x, out, grad;
  bool keep_inputs, need_x, need_folded, need_value;
  // Whether several threads share it, in every element type and by every instruction set.
  bool large;
};

const Case CASES[] = {
    {"one voxel", {1, 1, 1, 1, 1}, {2, 3, 4}, CHANNELS_FIRST, CHANNELS_FIRST, CHANNELS_FIRST, true, true, true, true,
     false},
    {"odd sizes", {2, 5, 3, 7, 9}, {4, 2, 3, 4}, EVERY_THIRD, CHANNELS_FIRST, EXPANDED, false, true, true, true, false},
    {"two panels", {1, 67, 2, 3, 17}, {3}, CHANNELS_LAST, CHANNELS_LAST, CHANNELS_FIRST, true, true, true, true, false},
    {"more slices than a vector", {1, 3, 2, 3, 37}, {4}, CHANNELS_FIRST, TURNED, CHANNELS_LAST, true, true, false, true,
     false},
    {"one slice", {2, 9, 1, 5, 19}, {2}, TURNED, EVERY_THIRD, TURNED, true, true, true, false, false},
    {"four samples", {4, 20, 7, 9, 8}, {3, 4, 2}, CHANNELS_FIRST, CHANNELS_FIRST, CHANNELS_FIRST, true, true, true, true,
     true},
    {"channels last", {1, 33, 9, 16, 15}, {3, 2}, CHANNELS_LAST, CHANNELS_LAST, EXPANDED, false, true, true, true, true},
    {"a turned volume", {1, 20, 40, 5, 54}, {2, 4}, TURNED, CHANNELS_FIRST, EVERY_THIRD, false, false, true, true, true},
    {"large matrices and their sums", {8, 102, 2, 3, 3}, {2}, CHANNELS_FIRST, CHANNELS_LAST, CHANNELS_FIRST, true, true,
     true, true, true},
    {"large maps", {3, 3, 5, 2, 60}, {4}, CHANNELS_FIRST, EVERY_THIRD, CHANNELS_FIRST, true, true, true, true, true},
};

// What the calls of a case read: several of them at once, too.
struct Inputs {
  Inputs(const Case& test, Element element, Place place) : test(test), element(element), place(place), memory(place) {
    const int64_t channels = test.sizes[1], slices = test.sizes[test.axes[0]], square = channels * channels;
    const double size = 1 / std::sqrt(static_cast<double>(channels));
    x = random_volume(memory, element, test.sizes, test.x, 1);
    grad = random_volume(memory, element, test.sizes, test.grad, 2);
    weights = {random_values(memory, element, square, 3, size),      random_values(memory, element, channels, 4, 0.1),
               random_values(memory, element, square, 5, size),      random_values(memory, element, square, 6, size),
               random_values(memory, element, channels, 7, 0.1),     random_values(memory, element, test.axes.size(), 8, 1)};
    matrix = random_values(memory, element, test.sizes[0] * slices * slices, 9, 1);
  }
  Inputs(const Inputs&) = delete;

  const Case& test;
  Element element;
  Place place;
  Memory memory;
  Volume x, grad;
  rsa::Weights weights;
  void* matrix;
};

// The bits of all that is computed for a case.
Bits results(const Inputs& inputs, int instruction_set, int64_t threads) {
  const Case& test = inputs.test;
  const Element element = inputs.element;
  const int64_t batch = test.sizes[0], channels = test.sizes[1], square = channels * channels;
  const size_t steps = test.axes.size();
  Memory memory(inputs.place);
  Bits bits;
  int64_t most_chunks = 0;
  const auto call = [&](const auto& function) {
    // Scratch goes with the call.
    Memory scratch(inputs.place);
    ThreadHost host(threads, scratch, element);
    function(rsa::Block{rsa::passes_for(instruction_set, element), element, host.host, test.axes, 0.1});
    most_chunks = std::max(most_chunks, host.most_chunks);
  };

  const Volume out = empty_volume(memory, element, test.sizes, test.out);
  std::vector<void*> maps;
  for (const int64_t axis : test.axes) {
    maps.push_back(values(memory, element, batch * test.sizes[axis] * test.sizes[axis]));
  }
  std::vector<Volume> inner;
  for (size_t i = 1; i < steps; ++i) inner.push_back(empty_volume(memory, element, test.sizes, CHANNELS_LAST));
  call([&](const rsa::Block& block) {
    rsa::forward(block, inputs.x, inputs.weights, out, maps, test.keep_inputs ? inner : std::vector<Volume>());
  });
  take_out_volume(element, out, bits);

  const rsa::Weights grads = {values(memory, element, square),   values(memory, element, channels),
                              values(memory, element, square),   values(memory, element, square),
                              values(memory, element, channels), values(memory, element, steps)};
  const Volume grad_x = empty_volume(memory, element, test.sizes, test.x);
  const Volume work = test.keep_inputs ? empty_volume(memory, element, test.sizes, CHANNELS_LAST) : grad_x;
  call([&](const rsa::Block& block) {
    rsa::backward(block, inputs.grad, inputs.x, inner, test.keep_inputs ? inner.size() : 0, maps, inputs.weights, work,
                  grad_x, test.need_x, test.need_folded, test.need_value, grads);
  });
  for (size_t i = 0; i < steps; ++i) {
    const int64_t slices = test.sizes[test.axes[i]];
    take_out_all(element, maps[i], batch * slices * slices, bits);
  }
  if (test.need_x) take_out_volume(element, grad_x, bits);
  if (test.need_folded) {
    take_out_all(element, grads.theta_weight, square, bits);
    take_out_all(element, grads.theta_bias, channels, bits);
    take_out_all(element, grads.phi_weight, square, bits);
  }
  if (test.need_value) take_out_all(element, grads.g_weight, square, bits);
  take_out_all(element, grads.g_bias, channels, bits);
  take_out_all(element, grads.betas, steps, bits);

  const int64_t slices = test.sizes[test.axes[0]];
  void* logits = values(memory, element, batch * slices * slices);
  call([&](const rsa::Block& block) { rsa::contract(block, inputs.x, inputs.grad, logits); });
  take_out_all(element, logits, batch * slices * slices, bits);
  for (const bool transposed : {false, true}) {
    call([&](const rsa::Block& block) { rsa::mix(block, inputs.x, inputs.matrix, transposed, out); });
    take_out_volume(element, out, bits);
  }
  if (test.large && threads > 1 && most_chunks < 2) {
    fail(std::string("the case was meant to be shared between threads, and was not: ") + test.description);
  }
  return bits;
}

// A case with several numbers of threads, on the heap and before guarded pages, and from two threads at once.
int check(const Case& test, int instruction_set, Element element) {
  const Inputs heap(test, element, Place::kHeap), guarded(test, element, Place::kGuarded);
  const Bits expected = results(heap, instruction_set, 1);
  int calls = 1;
  const auto expect = [&](const Bits& bits, const char* what) {
    ++calls;
    if (bits != expected) fail(std::string(test.description) + ": other bits " + what);
  };
  expect(results(guarded, instruction_set, 3), "with 3 threads, before guarded pages");
  if (!test.large) return calls;
  Bits two, four;
  std::thread one([&] { two = results(heap, instruction_set, 2); });
  std::thread other([&] { four = results(heap, instruction_set, 4); });
  one.join();
  other.join();
  expect(two, "with 2 threads, while another call runs");
  expect(four, "with 4 threads, while another call runs");
  return calls;
}

}  // namespace

int main() {
  for (int instruction_set = 0; instruction_set <= rsa::best_instruction_set(); ++instruction_set) {
    for (const Element element : {Element::kFloat64, Element::kFloat32, Element::kBFloat16}) {
      // The last instruction set is for one element type.
      if (&rsa::passes_for(instruction_set, element) == &rsa::passes_for(std::max(instruction_set - 1, 0), element) &&
          instruction_set > 0) {
        continue;
      }
      int calls = 0;
      for (const Case& test : CASES) calls += check(test, instruction_set, element);
      std::printf("ok   %s %s: %d runs\n", rsa::name_of(instruction_set), name_of(element), calls);
      std::fflush(stdout);
    }
  }
}
