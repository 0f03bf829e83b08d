// The softmax mass of every pair of groups from a kept log-sum-exp, and the log-sum-exp of chosen rows.
//
// An item is some query groups of a head, or some of its rows, and one thread's work from end to end. What it sums is
// its own and in a fixed order, so that no bit depends on the number of threads. What is correct: reference.py.
#include <cmath>

#include "../cpp/dtypes.h"
#include "scores.h"

namespace sparse_compile::block_mass {
namespace {

constexpr float LARGEST_EXPONENT = 64.f, LARGEST_TERM = 0x1p64f;  // as in reference.py

// What the mass is made of beside q and k. `heads` null: all; `ratios` null: not wanted.
struct Search {
  Grouping queries;
  int64_t row_stride;
  const float* lse;
  const bool* heads;
  float* mass;
  double* ratios;

  int64_t looks(int64_t head, int64_t group) const {
    return (queries.size(head, group) + row_stride - 1) / row_stride;
  }

  // Whole groups, together at most `most_rows`; a larger group is an item of its own.
  void list(int64_t most_rows, int64_t first_head, int64_t last_head, std::vector<Item>& items) const {
    for (int64_t head = first_head; head < last_head; ++head) {
      if (heads && !heads[head]) continue;
      int64_t first = 0, rows = 0;
      for (int64_t group = 0; group + 1 < queries.groups; ++group) {
        const int64_t more = looks(head, group);
        if (rows > 0 && rows + more > most_rows) {
          items.push_back({head, first, group});
          first = group, rows = 0;
        }
        rows += more;
      }
      if (rows > 0) items.push_back({head, first, queries.groups - 1});
    }
  }
};

template <class M, typename T>
class MassWorker {
 public:
  MassWorker(const Search& search, const Scores<M, T>& scores, const PanelLayout& layout,
             const typename M::Unit* packed_keys)
      : search_(search), scores_(scores), layout_(layout), tile_(scores, layout, packed_keys), shift_(ROWS_AT_ONCE<M>),
        total_(ROWS_AT_ONCE<M>), slot_(ROWS_AT_ONCE<M>) {}

  void work(const Item& item) {
    constexpr int MOST = ROWS_AT_ONCE<M>;
    list_rows(item);
    sums_.assign(groups_.size() * scores_.keys.groups, 0.0);
    const int64_t rows = static_cast<int64_t>(tokens_.size()), tiles = (rows + MOST - 1) / MOST;
    for (int64_t n = 0; n < tiles; ++n) add_tile(item.head, rows * n / tiles, rows * (n + 1) / tiles);
    for (size_t slot = 0; slot < groups_.size(); ++slot) {
      const int64_t group = groups_[slot], count = scores_.keys.groups;
      const double share = double(search_.queries.size(item.head, group)) / search_.looks(item.head, group);
      float* to = search_.mass + (item.head * search_.queries.groups + group) * count;
      for (int64_t j = 0; j + 1 < count; ++j) to[j] = static_cast<float>(sums_[slot * count + j] * share);
    }
  }

 private:
  // The rows to look at, and a slot for each group that has any.
  void list_rows(const Item& item) {
    tokens_.clear(), slots_.clear(), groups_.clear();
    for (int64_t group = item.first; group < item.last; ++group) {
      const int64_t start = search_.queries.start(item.head, group), size = search_.queries.size(item.head, group);
      for (int64_t place = 0; place < size; place += search_.row_stride) {
        tokens_.push_back(search_.queries.token(item.head, start + place));
        slots_.push_back(static_cast<int>(groups_.size()));
      }
      if (size > 0) groups_.push_back(group);
    }
  }

  void add_tile(int64_t head, int64_t first, int64_t last) {
    const int rows = static_cast<int>(last - first);
    const int64_t* tokens = tokens_.data() + first;
    tile_.load_rows(head, rows, [&](int row) { return tokens[row]; });
    for (int row = 0; row < tile_.rows(); ++row) {
      const float lse = row < rows ? search_.lse[head * search_.queries.tokens + tokens[row]] : INF;
      shift_[row] = std::isfinite(lse) ? lse * LOG2_E : INF;  // of INF: no term
      slot_[row] = slots_[first + std::min(row, rows - 1)];
    }
    std::fill_n(total_.data(), rows, 0.0);
    columns_.assign((slot_[rows - 1] - slot_[0] + 1) * KEYS_AT_ONCE, 0.f);
    int64_t group = 0;
    tile_.for_each_step(
        [&](auto block, int row, const Step& step) { this->template add_terms<block()>(row, step); },
        [&](const Step& step) { group = add_columns(step, group); });
    if (!search_.ratios) return;
    for (int row = 0; row < rows; ++row) search_.ratios[head * search_.queries.tokens + tokens[row]] = total_[row];
  }

  // Sum the terms of a block of rows: by rows, and by keys over the rows of each group.
  template <int ROWS>
  void add_terms(int first, const Step& step) {
    Vector sums[ROWS] = {};
    for (int row = 0, last = 0; row < ROWS; row = last) {
      const int slot = slot_[first + row];
      while (last < ROWS && slot_[first + last] == slot) ++last;
      float* columns = columns_.data() + (slot - slot_[0]) * KEYS_AT_ONCE;
      for (int n = 0; n < step.panels(); ++n) {
        const int count = tile_.count(step.first + n);
        Vector column = load(columns + n * PANEL);
        for (int r = row; r < last; ++r) {
          const Vector exponent = scores_.exponents(tile_.of_row(r) + n * PANEL, count) - splat(shift_[first + r]);
          // Exactly the cut-off also for NaN and infinity, so that a row that has one of these is not trusted.
          const Vector term = exponent < splat(LARGEST_EXPONENT) ? exp2_below_127(exponent) : splat(LARGEST_TERM);
          sums[r] += term;
          column += exponent < splat(INF) ? term : Vector{};
        }
        store(columns + n * PANEL, column);
      }
    }
    for (int r = 0; r < ROWS; ++r) total_[first + r] += sum(sums[r]);
  }

  // Add what a step gave each key to its group, from `group` on, and forget it; the group of the last panel.
  int64_t add_columns(const Step& step, int64_t group) {
    const int64_t slots = static_cast<int64_t>(columns_.size()) / KEYS_AT_ONCE, head = tile_.key_head();
    for (int64_t panel = step.first; panel < step.last;) {
      while (layout_.first(head, group + 1) <= panel) ++group;
      const int64_t stop = std::min(step.last, layout_.first(head, group + 1));
      for (int64_t slot = 0; slot < slots; ++slot) {
        Vector total{};
        for (int64_t n = panel; n < stop; ++n) {
          float* column = columns_.data() + slot * KEYS_AT_ONCE + (n - step.first) * PANEL;
          total += load(column);
          store(column, Vector{});
        }
        sums_[(slot_[0] + slot) * scores_.keys.groups + group] += sum(total);
      }
      panel = stop;
    }
    return group;
  }

  const Search& search_;
  const Scores<M, T>& scores_;
  const PanelLayout& layout_;
  Tile<M, T> tile_;
  std::vector<int64_t> tokens_, groups_;  // rows looked at, groups by slot
  std::vector<int> slots_;                // of these rows
  std::vector<double> sums_;              // by slot and key group
  std::vector<float> shift_;              // of a row of the tile: its log-sum-exp in base 2
  std::vector<double> total_;             // of a row of the tile
  std::vector<int> slot_;                 // of a row of the tile
  std::vector<float> columns_;            // by slot of the tile and key of the step
};

// Rows whose log-sum-exp is wanted: `chosen` and `lse` by query head and token.
struct Renewal {
  const bool* chosen;
  float* lse;
  int64_t tokens;

  // As many tokens as have at most `most_rows` that are chosen.
  void list(int64_t most_rows, int64_t first_head, int64_t last_head, std::vector<Item>& items) const {
    for (int64_t head = first_head; head < last_head; ++head) {
      const bool* own = chosen + head * tokens;
      int64_t first = 0, rows = 0;
      for (int64_t token = 0; token < tokens; ++token) {
        if (!own[token]) continue;
        if (rows == most_rows) items.push_back({head, first, token}), first = token, rows = 0;
        ++rows;
      }
      if (rows > 0) items.push_back({head, first, tokens});
    }
  }
};

template <class M, typename T>
class RenewalWorker {
 public:
  RenewalWorker(const Renewal& renewal, const Scores<M, T>& scores, const PanelLayout& layout,
                const typename M::Unit* packed_keys)
      : renewal_(renewal), scores_(scores), tile_(scores, layout, packed_keys) {}

  void work(const Item& item) {
    std::vector<int64_t> tokens;
    for (int64_t token = item.first; token < item.last; ++token)
      if (renewal_.chosen[item.head * renewal_.tokens + token]) tokens.push_back(token);
    tile_.load_rows(item.head, static_cast<int>(tokens.size()), [&](int row) { return tokens[row]; });
    std::fill_n(peak_, tile_.rows(), -INF);
    std::fill_n(total_, tile_.rows(), 0.f);
    tile_.for_each_step(
        [&](auto block, int first, const Step& step) {
          for (int row = 0; row < block(); ++row) add_row(first + row, tile_.of_row(row), step);
        },
        [](const Step&) {});
    for (size_t row = 0; row < tokens.size(); ++row) {
      const bool any = total_[row] != 0.f;  // also where it is NaN
      renewal_.lse[item.head * renewal_.tokens + tokens[row]] =
          any ? (peak_[row] + std::log2(total_[row])) * LN_2 : -INF;
    }
  }

 private:
  void add_row(int row, float* scores, const Step& step) {
    Vector highest = splat(-INF);
    for (int n = 0; n < step.panels(); ++n) {
      const Vector exponent = scores_.exponents(scores + n * PANEL, tile_.count(step.first + n));
      highest = maximum(highest, exponent);
      store(scores + n * PANEL, exponent);
    }
    const float peak = std::max(peak_[row], largest(highest));
    const float base = peak == -INF ? 0.f : peak;
    Vector sums{};
    for (int n = 0; n < step.panels(); ++n) sums += exp2_below_127(load(scores + n * PANEL) - splat(base));
    total_[row] = total_[row] * std::exp2(peak_[row] - base) + sum(sums);
    peak_[row] = peak;
  }

  const Renewal& renewal_;
  const Scores<M, T>& scores_;
  Tile<M, T> tile_;
  float peak_[ROWS_AT_ONCE<M>], total_[ROWS_AT_ONCE<M>];  // of a row: its highest exponent, and the sum relative to it
};

}  // namespace

void block_mass(const at::Tensor& q, const at::Tensor& k, const std::optional<at::Tensor>& q_order,
                const at::Tensor& q_offsets, const std::optional<at::Tensor>& k_order, const at::Tensor& k_offsets,
                const at::Tensor& lse, const std::optional<at::Tensor>& heads, double scale, int64_t row_stride,
                const at::Tensor& mass, const std::optional<at::Tensor>& ratios) {
  TORCH_CHECK(row_stride > 0, "row_stride must be at least 1, not ", row_stride);
  const Search search{Grouping(q_order, q_offsets, q), row_stride, lse.const_data_ptr<float>(),
                      heads ? heads->const_data_ptr<bool>() : nullptr, mass.mutable_data_ptr<float>(),
                      ratios ? ratios->mutable_data_ptr<double>() : nullptr};
  with_types_of(q, [&]<class M, typename T>(M, T) {
    const Scores<M, T> scores(q, k, Grouping(k_order, k_offsets, k), scale);
    scores.run([&](auto&&... range) { search.list(ROWS_AT_ONCE<M>, range...); },
               [&](const auto&... keys) { return MassWorker<M, T>(search, scores, keys...); });
  });
}

void log_sum_exp(const at::Tensor& q, const at::Tensor& k, const std::optional<at::Tensor>& k_order,
                 const at::Tensor& k_offsets, const at::Tensor& chosen, double scale, const at::Tensor& lse) {
  const Renewal renewal{chosen.const_data_ptr<bool>(), lse.mutable_data_ptr<float>(), q.size(2)};
  with_types_of(q, [&]<class M, typename T>(M, T) {
    const Scores<M, T> scores(q, k, Grouping(k_order, k_offsets, k), scale);
    scores.run([&](auto&&... range) { renewal.list(ROWS_AT_ONCE<M>, range...); },
               [&](const auto&... keys) { return RenewalWorker<M, T>(renewal, scores, keys...); });
  });
}

}  // namespace sparse_compile::block_mass
