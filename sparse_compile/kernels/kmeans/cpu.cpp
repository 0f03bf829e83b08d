// The steps of Lloyd's k-means (docs/svg2.md, section 5), of all heads at once. The definition of correct:
// reference.py.
//
// A block of tokens is scored against two panels of centroids at a time, and what is left of the scores is the least
// distance of each lane and the panel it was found in: scores never leave the first-level cache.
#include <cmath>

#include "../cpp/dtypes.h"
#include "../cpp/group_means.h"
#include "../cpp/micro_kernel.h"

namespace sparse_compile::kmeans {
namespace {

constexpr int TOKENS_AN_ITEM = 10 * MOST_ROWS;
constexpr int64_t TOKENS_TO_CHECK = 1024;

// The least number, and the lane or other number that goes with it, the lower one of equals. Never NaN.
inline int32_t index_of_least(Vector values, IntVector indices) {
  const float least = -largest(-values);
  const auto smaller = [](IntVector a, IntVector b) { return a < b ? a : b; };
  const IntVector none = IntVector{} + std::numeric_limits<int32_t>::max();
  IntVector left = values == splat(least) ? indices : none;
  if constexpr (LANES == 16) left = smaller(left, (IntVector)rotated<8>((Vector)left));
  left = smaller(left, (IntVector)rotated<4>((Vector)left));
  left = smaller(left, (IntVector)rotated<2>((Vector)left));
  return smaller(left, (IntVector)rotated<1>((Vector)left))[0];
}

// The nearest centroid of each token: the least |c|^2 - 2 x.c, the lowest index among equals.
template <class M, typename T>
class Assignment {
  using Unit = typename M::Unit;

 public:
  // x [batch, heads, tokens, size]; centroids float32 [batch, heads, clusters, size], dense.
  Assignment(const at::Tensor& x, const at::Tensor& centroids)
      : x_(x), heads_(x.size(0) * x.size(1)), tokens_(x.size(2)), size_(x.size(3)), clusters_(centroids.size(2)),
        panels_((clusters_ + PANEL - 1) / PANEL), packed_(size_, 0), norms_(heads_ * panels_ * PANEL),
        keys_(reinterpret_cast<Unit*>(workspace(heads_ * panels_ * packed_.keys * sizeof(Unit)))) {
    pack(centroids.const_data_ptr<float>());
  }

  // Both [batch, heads, tokens], dense; a token that is not included gets 0.
  void run(const bool* included, int32_t* labels) const {
    const int64_t blocks = (tokens_ + TOKENS_AN_ITEM - 1) / TOKENS_AN_ITEM;
    for_each_item(heads_ * blocks, [&] {
      return [&, rows = std::vector<Unit>(TOKENS_AN_ITEM * packed_.depth)](int64_t item) mutable {
        const int64_t head = item / blocks, first = item % blocks * TOKENS_AN_ITEM;
        const int count = static_cast<int>(std::min<int64_t>(TOKENS_AN_ITEM, tokens_ - first));
        int32_t nearest[TOKENS_AN_ITEM];
        std::fill(rows.begin(), rows.end(), Unit(0));
        for (int n = 0; n < count; ++n) {
          prefetch(x_.row(head, std::min(first + n + ROWS_AHEAD, tokens_ - 1)), size_);
          M::copy_row(rows.data() + n * packed_.depth, x_.row(head, first + n), size_);
        }
        for_row_blocks(rounded_up(count), [&](auto block, int row) {
          this->template search<block()>(head, rows.data() + row * packed_.depth, nearest + row);
        });
        const int64_t place = head * tokens_ + first;
        for (int n = 0; n < count; ++n) labels[place + n] = included[place + n] ? nearest[n] : 0;
      };
    });
  }

 private:
  // Centroids are rounded to the dtype of the tokens first, and their norms are those of the rounded values. One whose
  // norm overflows is never the nearest: its norm is infinite, and its products are 0 rather than NaN.
  void pack(const float* centroids) {
    for_each_item(heads_ * panels_, [&] {
      return [&, rounded = std::vector<T>(PANEL * size_),
              scratch = std::vector<Unit>(PANEL * packed_.depth)](int64_t item) mutable {
        const int64_t head = item / panels_, first = item % panels_ * PANEL;
        const int count = static_cast<int>(std::min<int64_t>(PANEL, clusters_ - first));
        const T* rows[PANEL];
        std::fill_n(&norms_[item * PANEL], PANEL, INF);
        for (int n = 0; n < count; ++n) {
          T* row = rounded.data() + n * size_;
          const float* from = centroids + (head * clusters_ + first + n) * size_;
          double norm = 0;
          for (int64_t c = 0; c < size_; ++c) {
            row[c] = static_cast<T>(from[c]);
            norm += static_cast<double>(static_cast<float>(row[c])) * static_cast<float>(row[c]);
          }
          if (norm <= std::numeric_limits<float>::max()) norms_[item * PANEL + n] = static_cast<float>(norm);
          else std::fill_n(row, size_, T(0.f));
          rows[n] = row;
        }
        pack_keys<M>(keys_ + item * packed_.keys, rows, count, size_, packed_, scratch.data());
      };
    });
  }

  template <int ROWS>
  void search(int64_t head, const Unit* rows, int32_t* nearest) const {
    constexpr int STRIDE = 2 * PANEL;
    alignas(64) float scores[ROWS * STRIDE];
    Vector least[ROWS];
    IntVector found[ROWS] = {};  // the panel of each lane's least distance
    std::fill_n(least, ROWS, splat(INF));
    const auto keep_least = [&](int64_t panel, const float* of_panel) {
      const Vector norms = load(&norms_[(head * panels_ + panel) * PANEL]);
      for (int row = 0; row < ROWS; ++row) {
        const Vector distance = norms - splat(2.f) * load(of_panel + row * STRIDE);
        const IntVector closer = distance < least[row];
        least[row] = closer ? distance : least[row];
        found[row] = closer ? IntVector{} + static_cast<int32_t>(panel) : found[row];
      }
    };
    const int64_t depth = packed_.depth;
    const Unit* keys = keys_ + head * panels_ * packed_.keys;
    int64_t panel = 0;
    for (; panel + 1 < panels_; panel += 2, keys += 2 * packed_.keys) {
      multiply_keys<M, ROWS, 2>(rows, depth, keys, keys + packed_.keys, depth, scores, STRIDE);
      keep_least(panel, scores);
      keep_least(panel + 1, scores + PANEL);
    }
    if (panel < panels_) {
      multiply_keys<M, ROWS, 1>(rows, depth, keys, keys, depth, scores, STRIDE);
      keep_least(panel, scores);
    }
    IntVector lane;
    for (int i = 0; i < LANES; ++i) lane[i] = i;
    for (int row = 0; row < ROWS; ++row) nearest[row] = index_of_least(least[row], found[row] * PANEL + lane);
  }

  const Rows<T> x_;
  const int64_t heads_, tokens_, size_, clusters_, panels_;
  const Packed<M> packed_;
  std::vector<float> norms_;  // by panels
  Unit* const keys_;
};

// Whether scores of a token can neither be NaN nor overflow.
template <typename T>
bool is_countable(const T* token, int64_t size) {
  Vector squares{};
  int64_t done = 0;
  for (; done + LANES <= size; done += LANES) {
    float part[LANES];
    for (int c = 0; c < LANES; ++c) part[c] = static_cast<float>(token[done + c]);
    squares += load(part) * load(part);
  }
  float rest = 0;
  for (; done < size; ++done) rest += static_cast<float>(token[done]) * static_cast<float>(token[done]);
  return sum(squares) + rest < std::numeric_limits<float>::max() / 16;
}

}  // namespace

// x [batch, heads, tokens, size]; result bool [batch, heads, tokens], dense.
void countable(const at::Tensor& x, at::Tensor& result) {
  const int64_t heads = x.size(0) * x.size(1), tokens = x.size(2), size = x.size(3);
  const int64_t blocks = (tokens + TOKENS_TO_CHECK - 1) / TOKENS_TO_CHECK;
  bool* out = result.mutable_data_ptr<bool>();
  with_types_of(x, [&]<class M, typename T>(M, T) {
    const Rows<T> rows(x);
    for_each_item(heads * blocks, [&] {
      return [&](int64_t item) {
        const int64_t head = item / blocks, first = item % blocks * TOKENS_TO_CHECK;
        for (int64_t token = first; token < std::min(tokens, first + TOKENS_TO_CHECK); ++token) {
          prefetch(rows.row(head, std::min(token + ROWS_AHEAD, tokens - 1)), size);
          out[head * tokens + token] = is_countable(rows.row(head, token), size);
        }
      };
    });
  });
}

// x [batch, heads, tokens, size]; centroids float32 [batch, heads, clusters, size], included bool and labels int32
// [batch, heads, tokens], all dense.
void assign(const at::Tensor& x, const at::Tensor& centroids, const at::Tensor& included, at::Tensor& labels) {
  with_types_of(x, [&]<class M, typename T>(M, T) {
    Assignment<M, T>(x, centroids).run(included.const_data_ptr<bool>(), labels.mutable_data_ptr<int32_t>());
  });
}

// Shapes as in `assign`. Every centroid moves to the mean of the included tokens of its label; without any it stays.
void update(const at::Tensor& x, const at::Tensor& labels, const at::Tensor& included, at::Tensor& centroids) {
  const int64_t heads = x.size(0) * x.size(1), tokens = x.size(2), clusters = centroids.size(2);
  const auto integers = x.options().dtype(at::kInt);
  at::Tensor order = at::empty({x.size(0), x.size(1), tokens}, integers);
  at::Tensor offsets = at::empty({x.size(0), x.size(1), clusters + 2}, integers);
  const int32_t* label = labels.const_data_ptr<int32_t>();
  const bool* counts = included.const_data_ptr<bool>();
  int32_t *sorted = order.mutable_data_ptr<int32_t>(), *bounds = offsets.mutable_data_ptr<int32_t>();
  for_each_item(heads, [&] {
    return [&](int64_t head) {
      const int64_t place = head * tokens;
      const auto label_of = [&](int64_t token) -> int64_t {  // what is not included comes last
        if (!counts[place + token]) return clusters;
        const int64_t own = label[place + token];
        TORCH_CHECK(own < clusters, "labels must lie between 0 and ", clusters - 1, "; got ", own);
        return own;
      };
      sort_by_label(tokens, clusters + 1, label_of, sorted + place, bounds + head * (clusters + 2));
    };
  });
  const Grouping grouping(order, offsets, x);
  with_types_of(x, [&]<class M, typename T>(M, T) {
    group_means(Rows<T>(x), x.size(3), grouping, heads, centroids.mutable_data_ptr<float>(), clusters);
  });
}

}  // namespace sparse_compile::kmeans
