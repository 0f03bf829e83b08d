// What stands for each key group, and how keys and values vary together within the groups (docs/correction.md). The
// definition of correct: reference.py.
//
// The coupling is a sum over tokens of outer products. Deviations of TOKENS_AT_ONCE tokens are laid out row by row in
// the second-level cache and multiplied block by block of the matrix. The sums of TOKENS_IN_FLOAT32 tokens are float32,
// all others float64. A head's positions are cut into parts, as many as the number of its tokens alone says.
#include "../cpp/dtypes.h"
#include "../cpp/group_means.h"
#include "../cpp/micro_kernel.h"

namespace sparse_compile::pooled_keys {
namespace {

constexpr int TOKENS_AT_ONCE = 128;
constexpr int64_t TOKENS_IN_FLOAT32 = 8 * TOKENS_AT_ONCE;
constexpr int64_t MOST_PARTS = 16;

// sums [ROWS, CHUNK] += sum over tokens of a [ROWS] b [CHUNK]^T
template <int ROWS>
__attribute__((noinline)) void add_outer_products(const float* a, int64_t a_stride, const float* b, int64_t b_stride,
                                                  int tokens, float* sums, int64_t sum_stride) {
  constexpr int VECTORS = CHUNK / LANES;
  Vector total[ROWS][VECTORS];
#pragma GCC unroll 32
  for (int i = 0; i < ROWS * VECTORS; ++i)
    total[i / VECTORS][i % VECTORS] = load(sums + i / VECTORS * sum_stride + i % VECTORS * LANES);
  for (int token = 0; token < tokens; ++token, a += a_stride, b += b_stride) {
#pragma GCC unroll 32
    for (int i = 0; i < ROWS * VECTORS; ++i) {
      const int row = i / VECTORS, part = i % VECTORS;
      total[row][part] = Float32::multiply_add(total[row][part], a[row], b + part * LANES);
    }
  }
#pragma GCC unroll 32
  for (int i = 0; i < ROWS * VECTORS; ++i)
    store(sums + i / VECTORS * sum_stride + i % VECTORS * LANES, total[i / VECTORS][i % VECTORS]);
}

// The coupling of all heads; means as `pooled_keys` makes them.
template <typename T>
class Coupling {
 public:
  Coupling(const at::Tensor& k, const at::Tensor& v, const Grouping& keys, const bool* visual, const float* mean_k,
           const float* mean_v)
      : k_(k), v_(v), keys_(keys), visual_(visual), mean_k_(mean_k), mean_v_(mean_v),
        heads_(k.size(0) * k.size(1)), size_(k.size(3)), value_size_(v.size(3)),
        parts_(std::clamp<int64_t>((keys.tokens + TOKENS_IN_FLOAT32 - 1) / TOKENS_IN_FLOAT32, 1, MOST_PARTS)),
        part_tokens_((keys.tokens + parts_ - 1) / parts_) {}

  void run(float* coupling) {
    const int64_t elements = size_ * value_size_, bytes = parts_ * elements * int64_t(sizeof(double));
    const int64_t at_once = std::min(heads_, heads_at_once(bytes));
    auto* partials = reinterpret_cast<double*>(workspace(at_once * bytes));
    std::vector<int64_t> numbers(at_once * parts_);
    for (int64_t first = 0; first < heads_; first += at_once) {
      const int64_t heads = std::min(at_once, heads_ - first);
      for_each_item(heads * parts_, [&] {
        return [&, worker = Worker(*this)](int64_t item) mutable {
          numbers[item] = worker.add_part(first + item / parts_, item % parts_, partials + item * elements);
        };
      });
      for_each_item(heads * size_, [&] {
        return [&](int64_t item) {
          const int64_t own = item / size_, row = item % size_;
          write_row(partials + own * parts_ * elements + row * value_size_, &numbers[own * parts_],
                    coupling + (first + own) * elements + row * value_size_);
        };
      });
    }
  }

 private:
  class Worker;

  // A row of the matrix: the sums of its parts, added in their order, by the number of keys.
  void write_row(const double* partial, const int64_t* numbers, float* to) const {
    int64_t number = 0;
    for (int64_t part = 0; part < parts_; ++part) number += numbers[part];
    for (int64_t c = 0; c < value_size_; ++c) {
      double total = 0;
      for (int64_t part = 0; part < parts_; ++part) total += partial[part * size_ * value_size_ + c];
      to[c] = static_cast<float>(total / static_cast<double>(std::max<int64_t>(1, number)));
    }
  }

  const Rows<T> k_, v_;
  const Grouping& keys_;
  const bool* const visual_;
  const float *const mean_k_, *const mean_v_;
  const int64_t heads_, size_, value_size_, parts_, part_tokens_;
};

// One thread's scratch memory. What pads its rows is 0 and stays so.
template <typename T>
class Coupling<T>::Worker {
 public:
  explicit Worker(const Coupling& call)
      : call_(call), rows_(rounded_up(static_cast<int>(call.size_))),
        channels_((call.value_size_ + CHUNK - 1) / CHUNK * CHUNK),
        key_stride_(rows_ + LANES), value_stride_(channels_ + LANES),  // rows fall on different sets of the cache
        keys_(TOKENS_AT_ONCE * key_stride_), values_(TOKENS_AT_ONCE * value_stride_), sums_(rows_ * channels_) {}

  // Write the sum [size, value_size] over the visual keys of a part; returns how many they are.
  int64_t add_part(int64_t head, int64_t part, double* total) {
    std::fill_n(total, call_.size_ * call_.value_size_, 0.);
    const Grouping& grouping = call_.keys_;
    const int64_t groups = grouping.groups, padding = grouping.start(head, groups - 1);
    const int64_t stop = std::min(padding, (part + 1) * call_.part_tokens_);
    int64_t number = 0, group = 0;
    int filled = 0;
    for (int64_t position = part * call_.part_tokens_; position < stop; ++position) {
      while (position >= grouping.start(head, group + 1)) ++group;
      const int64_t token = grouping.token(head, position), place = head * groups + group;
      prefetch_after(call_.k_, call_.size_, grouping, head, position);
      prefetch_after(call_.v_, call_.value_size_, grouping, head, position);
      if (!call_.visual_[token]) continue;
      subtract(keys_.data() + filled * key_stride_, call_.k_.row(head, token), call_.mean_k_ + place * call_.size_,
               call_.size_);
      subtract(values_.data() + filled * value_stride_, call_.v_.row(head, token),
               call_.mean_v_ + place * call_.value_size_, call_.value_size_);
      ++number;
      if (++filled < TOKENS_AT_ONCE) continue;
      multiply(filled);
      filled = 0;
      if (number % TOKENS_IN_FLOAT32 == 0) empty_into(total);
    }
    multiply(filled);
    empty_into(total);
    return number;
  }

 private:
  // Differences before the product: a sum of products minus a product of sums would cancel.
  static void subtract(float* __restrict to, const T* __restrict from, const float* __restrict mean, int64_t size) {
    for (int64_t c = 0; c < size; ++c) to[c] = static_cast<float>(from[c]) - mean[c];
  }

  void multiply(int tokens) {
    for (int64_t channel = 0; channel < channels_; channel += CHUNK)
      for_row_blocks(rows_, [&](auto rows, int row) {
        add_outer_products<rows()>(keys_.data() + row, key_stride_, values_.data() + channel, value_stride_, tokens,
                                   sums_.data() + row * channels_ + channel, channels_);
      });
  }

  void empty_into(double* total) {
    for (int64_t row = 0; row < call_.size_; ++row)
      for (int64_t c = 0; c < call_.value_size_; ++c) total[row * call_.value_size_ + c] += sums_[row * channels_ + c];
    std::fill(sums_.begin(), sums_.end(), 0.f);
  }

  const Coupling& call_;
  const int rows_;
  const int64_t channels_, key_stride_, value_stride_;
  std::vector<float> keys_, values_, sums_;
};

}  // namespace

// k [batch, heads, tokens, size]; v [batch, heads, tokens, value_size]; order and offsets of a Plan; visual bool
// [tokens]; mean_k and mean_v float32 [batch, heads, groups, size], written except for empty groups and padding;
// coupling float32 [batch, heads, size, value_size], or without elements. All but k and v are dense.
void pooled_keys(const at::Tensor& k, const at::Tensor& v, const std::optional<at::Tensor>& order,
                 const at::Tensor& offsets, const at::Tensor& visual, at::Tensor& mean_k, at::Tensor& mean_v,
                 at::Tensor& coupling) {
  const Grouping keys(order, offsets, k);
  const int64_t heads = k.size(0) * k.size(1);
  with_types_of(k, [&]<class M, typename T>(M, T) {
    float *means_of_k = mean_k.mutable_data_ptr<float>(), *means_of_v = mean_v.mutable_data_ptr<float>();
    group_means(Rows<T>(k), k.size(3), keys, heads, means_of_k, keys.groups);
    group_means(Rows<T>(v), v.size(3), keys, heads, means_of_v, keys.groups);
    if (coupling.numel())
      Coupling<T>(k, v, keys, visual.const_data_ptr<bool>(), means_of_k, means_of_v)
          .run(coupling.mutable_data_ptr<float>());
  });
}

}  // namespace sparse_compile::pooled_keys
