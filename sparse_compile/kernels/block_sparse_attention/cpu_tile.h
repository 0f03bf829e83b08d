// One tile of attention: at most ROWS_AT_ONCE queries of a group against the panels that the group keeps.
//
// It goes through its panels in steps that stay in the second-level cache, and in each step through its rows in blocks
// whose scores stay in the first-level cache: scores, online softmax, values (FlashAttention-2, arXiv 2307.08691).
#pragma once

#include "cpu_call.h"

namespace sparse_compile {

struct Tile {
  int64_t head, group, position;
  int rows;
  int64_t cost;
};

// What one tile attends to, in parallel vectors. A bias [PANEL] is added to the scores; -inf hides a key. Null: none.
template <class Unit>
struct PanelList {
  std::vector<const Unit*> keys, values;
  std::vector<const float*> biases;

  void clear() { keys.clear(), values.clear(), biases.clear(); }
  void add(const Unit* panel_keys, const Unit* panel_values, const float* bias) {
    keys.push_back(panel_keys), values.push_back(panel_values), biases.push_back(bias);
  }
};

// One thread's part: its scratch memory, and the tile it is at.
template <class M, typename T>
class TileWorker {
  using Unit = typename M::Unit;

 public:
  explicit TileWorker(const AttentionCall<M, T>& call)
      : call_(call), channels_(call.packed.chunks * CHUNK), q_(ROWS_AT_ONCE<M> * call.packed.depth),
        scores_(BLOCK_ROWS<M> * SCORE_STRIDE), sums_(ROWS_AT_ONCE<M> * channels_), change_(BLOCK_ROWS<M> * channels_),
        peak_(ROWS_AT_ONCE<M>), total_(ROWS_AT_ONCE<M>), pooled_total_(ROWS_AT_ONCE<M>),
        pooled_bias_(call.pooled_panels * PANEL) {}

  void attend(const Tile& tile) {
    const int64_t key_head = tile.head / call_.shared, own = key_head - call_.first_key_head;
    rows_ = rounded_up<M>(tile.rows);
    if constexpr (USES_TILES<M>) configure_tiles();
    load_queries(tile);
    std::fill_n(sums_.data(), rows_ * channels_, 0.f);
    std::fill_n(peak_.data(), rows_, -INF);
    std::fill_n(total_.data(), rows_, 0.f);
    std::fill_n(pooled_total_.data(), rows_, 0.f);
    const bool pooled = list_pooled(tile, key_head, own);
    if (pooled) {
      add_panels();
      std::copy_n(total_.data(), rows_, pooled_total_.data());
    }
    list_kept(tile, key_head);
    add_panels();
    if (pooled && call_.coupling_panels) add_coupling(own);
    if constexpr (USES_TILES<M>) release_tiles();
    write(tile);
    if (pooled && !call_.spoiled[own].empty()) spoil(tile, key_head, own);
  }

 private:
  void load_queries(const Tile& tile) {
    const int64_t depth = call_.packed.depth;
    std::fill_n(q_.data(), rows_ * depth, Unit(0));
    std::vector<T> turned(call_.sign == 1.f ? 0 : call_.size);
    for (int row = 0; row < tile.rows; ++row) {
      const T* from = call_.q.row(tile.head, call_.queries.token(tile.head, tile.position + row));
      if (call_.sign != 1.f) {
        for (int64_t c = 0; c < call_.size; ++c) turned[c] = static_cast<T>(static_cast<float>(from[c]) * call_.sign);
        from = turned.data();
      }
      M::copy_row(q_.data() + row * depth, from, call_.size);
    }
  }

  // Whether the tile skips anything that a pooled key stands for; padding queries see none.
  bool list_pooled(const Tile& tile, int64_t key_head, int64_t own) {
    list_.clear();
    if (tile.group + 1 == call_.queries.groups) return false;
    for (int64_t panel = 0; panel < call_.pooled_panels; ++panel) {
      float* bias = pooled_bias_.data() + panel * PANEL;
      bool any = false;
      for (int n = 0; n < PANEL; ++n) {
        const int64_t group = panel * PANEL + n;
        const bool seen = group < call_.keys.groups && call_.can_stand_for(key_head, group) &&
                          !call_.keeps(tile.head, tile.group, group);
        bias[n] = seen ? call_.pooled.log_size[key_head * call_.keys.groups + group] / call_.scale : -INF;
        any |= seen;
      }
      const int64_t place = own * call_.pooled_panels + panel;
      if (any)
        list_.add(call_.pooled_keys + place * call_.packed.keys, call_.pooled_values + place * call_.packed.values,
                  bias);
    }
    return !list_.keys.empty();
  }

  void list_kept(const Tile& tile, int64_t key_head) {
    const PanelLayout& layout = *call_.layout;
    list_.clear();
    for (int64_t group = 0; group + 1 < call_.keys.groups; ++group) {
      if (!call_.keeps(tile.head, tile.group, group)) continue;
      for (int64_t panel = layout.first(key_head, group); panel < layout.first(key_head, group + 1); ++panel) {
        const int count = layout.source(panel).count;
        list_.add(call_.packed_keys + panel * call_.packed.keys, call_.packed_values + panel * call_.packed.values,
                  count == PANEL ? nullptr : PRESENT[count].data());
      }
    }
  }

  // Go through the listed panels in even steps.
  void add_panels() {
    for_even_steps(static_cast<int64_t>(list_.keys.size()), [&](int64_t first, int64_t last) {
      const int count = static_cast<int>(last - first);
      for_row_blocks<M>(rows_, [&](auto rows, int row) { this->template add_block<rows()>(row, first, count); });
    });
  }

  template <int ROWS>
  void add_block(int row, int64_t first, int count) {
    const int64_t depth = call_.packed.depth;
    const auto keys_of = [&](int n) { return list_.keys[first + n]; };
    multiply_panels<M, ROWS>(q_.data() + row * depth, depth, count, keys_of, scores_.data(), SCORE_STRIDE);
    for (int n = 0; n < count; ++n)
      if (const float* bias = list_.biases[first + n]) add_bias<ROWS>(scores_.data() + n * PANEL, load(bias));
    float factors[ROWS];
    for (int r = 0; r < ROWS; ++r) factors[r] = weigh(row + r, scores_.data() + r * SCORE_STRIDE, count);
    for (int64_t chunk = 0; chunk < call_.packed.chunks; ++chunk)
      add_values<M, ROWS>(reinterpret_cast<const Unit*>(scores_.data()), SCORE_STRIDE, list_.values.data() + first,
                          count, chunk * Packed<M>::PANEL_DEPTH * CHUNK, factors,
                          sums_.data() + row * channels_ + chunk * CHUNK, channels_);
  }

  // A hidden key has a score of -inf, also where its own is NaN.
  template <int ROWS>
  static void add_bias(float* scores, Vector bias) {
    for (int r = 0; r < ROWS; ++r, scores += SCORE_STRIDE)
      store(scores, bias == splat(-INF) ? bias : load(scores) + bias);
  }

  // Turn the scores of a row into weights, in place; the factor by which everything before has to shrink.
  float weigh(int row, float* scores, int count) {
    const float to_base_2 = call_.scale * LOG2_E;
    Vector even = load(scores), odd = even;
    for (int n = 1; n + 1 < count; n += 2) {
      even = maximum(even, load(scores + n * PANEL));
      odd = maximum(odd, load(scores + (n + 1) * PANEL));
    }
    if (count % 2 == 0) even = maximum(even, load(scores + (count - 1) * PANEL));
    const float peak = std::max(peak_[row], largest(maximum(even, odd)));
    const float base = peak == -INF ? 0.f : peak;
    const float factor = std::exp2((peak_[row] - base) * to_base_2);
    const auto weights = reinterpret_cast<Unit*>(scores);
    Vector sums[2] = {};
    for (int n = 0; n < count; ++n) {
      const Vector weight = exp2_below_127((load(scores + n * PANEL) - splat(base)) * splat(to_base_2));
      sums[n % 2] += weight;
      M::store_weights(weights, n * PANEL, weight);
    }
    total_[row] = total_[row] * factor + sum(sums[0] + sums[1]);
    pooled_total_[row] *= factor;
    peak_[row] = peak;
    return factor;
  }

  // The pooled share of the softmax times scale q C (docs/correction.md).
  void add_coupling(int64_t own) {
    std::vector<const Unit*> panels;
    for (int64_t n = 0; n < call_.coupling_panels; ++n)
      panels.push_back(call_.packed_coupling + (own * call_.coupling_panels + n) * call_.packed.values);
    const int64_t depth = call_.packed.depth;
    for_row_blocks<M>(rows_, [&](auto rows, int row) {
      std::fill_n(change_.data(), rows() * channels_, 0.f);
      const float factors[BLOCK_ROWS<M>] = {};
      for (int64_t chunk = 0; chunk < call_.packed.chunks; ++chunk)
        add_values<M, rows()>(q_.data() + row * depth, depth, panels.data(), static_cast<int>(panels.size()),
                              chunk * Packed<M>::PANEL_DEPTH * CHUNK, factors, change_.data() + chunk * CHUNK,
                              channels_);
      for (int r = 0; r < rows(); ++r) {
        const float share = pooled_total_[row + r] * call_.scale;
        for (int64_t c = 0; c < channels_; ++c) sums_[(row + r) * channels_ + c] += share * change_[r * channels_ + c];
      }
    });
  }

  void write(const Tile& tile) const {
    for (int row = 0; row < tile.rows; ++row) {
      const int64_t token = call_.queries.token(tile.head, tile.position + row);
      T* to = call_.out.row(tile.head, token);
      const bool any = total_[row] != 0.f;  // also where it is NaN
      const float share = any ? 1.f / total_[row] : 0.f;
      for (int64_t c = 0; c < call_.value_size; ++c)
        to[c] = static_cast<T>(any ? sums_[row * channels_ + c] * share : 0.f);
      call_.lse[tile.head * call_.queries.tokens + token] =
          any ? peak_[row] * call_.scale + std::log2(total_[row]) * LN_2 : -INF;
    }
  }

  // NaN in the channels where a pooled value that the tile sees is not finite.
  void spoil(const Tile& tile, int64_t key_head, int64_t own) const {
    for (const int64_t group : call_.spoiled[own]) {
      if (call_.keeps(tile.head, tile.group, group)) continue;
      const float* values = call_.pooled.mean_v + (key_head * call_.keys.groups + group) * call_.value_size;
      for (int row = 0; row < tile.rows; ++row) {
        T* to = call_.out.row(tile.head, call_.queries.token(tile.head, tile.position + row));
        for (int64_t c = 0; c < call_.value_size; ++c)
          if (!std::isfinite(values[c])) to[c] = std::numeric_limits<float>::quiet_NaN();
      }
    }
  }

  const AttentionCall<M, T>& call_;
  const int64_t channels_;
  int rows_ = 0;
  std::vector<Unit> q_;
  std::vector<float> scores_, sums_, change_, peak_, total_, pooled_total_, pooled_bias_;
  PanelList<Unit> list_;
};

}  // namespace sparse_compile
