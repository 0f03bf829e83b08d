// Scores of the rows of one tile after the other against all valid keys of their head, without their ever being whole.
//
// Keys are packed once a head, in panels that belong to one group each; padding is left out. A tile is at most
// ROWS_AT_ONCE rows. It goes through all panels in steps that stay in the second-level cache, and in each step through
// its rows in blocks whose scores stay in the first-level cache.
#pragma once

#include "../cpp/grouped.h"
#include "../cpp/micro_kernel.h"

namespace sparse_compile::block_mass {

// Part of a query head: groups, or tokens, [first, last).
struct Item {
  int64_t head, first, last;
};

// Panels [first, last) that a tile goes through at once.
struct Step {
  int64_t first, last;

  int panels() const { return static_cast<int>(last - first); }
};

// The product of queries and keys, which both passes below are made of.
template <class M, typename T>
class Scores {
 public:
  using Unit = typename M::Unit;

  Scores(const at::Tensor& q, const at::Tensor& k, const Grouping& keys, double scale)
      : q(q), k(k), keys(keys), size(q.size(3)), key_heads(k.size(0) * k.size(1)),
        shared(k.size(1) ? q.size(1) / k.size(1) : 1), packed(size, 0), to_base_2(static_cast<float>(scale) * LOG2_E) {}

  // Do all items of `list(first query head, last query head, items)`, with as many heads packed at once as may be.
  // `make_worker(layout, packed keys)` is called once a thread and gives what does an item.
  template <class List, class MakeWorker>
  void run(List list, MakeWorker make_worker) const {
    // No group needs more than one panel that is not full.
    const int64_t bytes = (keys.tokens / PANEL + keys.groups) * packed.keys * sizeof(Unit);
    const int64_t at_once = heads_at_once(bytes);
    for (int64_t first = 0; first < key_heads; first += at_once) {
      const int64_t last = std::min(key_heads, first + at_once);
      std::vector<Item> items;
      list(first * shared, last * shared, items);
      if (items.empty()) continue;
      const PanelLayout layout(keys, first, last);
      const auto packed_keys = reinterpret_cast<Unit*>(workspace(layout.panels() * packed.keys * sizeof(Unit)));
      pack_panels<M, T>(layout, keys, k, k, size, 0, packed, packed_keys, nullptr);
      for_each_item(static_cast<int64_t>(items.size()), [&] {
        return [&, worker = make_worker(layout, packed_keys)](int64_t item) mutable { worker.work(items[item]); };
      });
    }
  }

  // Base 2 exponents of the scores of a panel, -inf where it has no key.
  Vector exponents(const float* scores, int count) const {
    const Vector exponent = load(scores) * splat(to_base_2);
    if (count == PANEL) return exponent;
    const Vector absent = load(PRESENT[count].data());
    return absent == splat(-INF) ? absent : exponent;  // also where a key of zeros gives NaN
  }

  const Rows<T> q, k;
  const Grouping keys;
  const int64_t size, key_heads, shared;
  const Packed<M> packed;
  const float to_base_2;
};

// The rows of one tile and their scores. One a thread.
template <class M, typename T>
class Tile {
  using Unit = typename M::Unit;

 public:
  Tile(const Scores<M, T>& scores, const PanelLayout& layout, const Unit* packed_keys)
      : scores_(scores), layout_(layout), packed_keys_(packed_keys), q_(ROWS_AT_ONCE<M> * scores.packed.depth),
        block_(BLOCK_ROWS<M> * SCORE_STRIDE) {}

  // Take up rows of a head, `token(0)` to `token(count - 1)`. To whole small blocks of rows, zeros are added.
  template <class Token>
  void load_rows(int64_t head, int count, Token token) {
    const int64_t depth = scores_.packed.depth;
    key_head_ = head / scores_.shared;
    rows_ = rounded_up<M>(count);
    std::fill_n(q_.data(), rows_ * depth, Unit(0));
    for (int row = 0; row < count; ++row)
      M::copy_row(q_.data() + row * depth, scores_.q.row(head, token(row)), scores_.size);
  }

  // Go through all panels in even steps: in each `visit(constant rows, first row, step)` by blocks, and `end(step)`.
  template <class Visit, class End>
  void for_each_step(Visit visit, End end) {
    const int64_t first = layout_.first(key_head_, 0), count = layout_.first(key_head_, scores_.keys.groups) - first;
    if constexpr (USES_TILES<M>) configure_tiles();
    for_even_steps(count, [&](int64_t begin, int64_t behind) {
      const Step step{first + begin, first + behind};
      for_row_blocks<M>(rows_, [&](auto rows, int row) {
        this->template multiply<rows()>(row, step);
        visit(rows, row, step);
      });
      end(step);
    });
    if constexpr (USES_TILES<M>) release_tiles();
  }

  int rows() const { return rows_; }
  int64_t key_head() const { return key_head_; }
  // Scores of a row of the block that is visited.
  float* of_row(int row) { return block_.data() + row * SCORE_STRIDE; }
  // How many keys a panel has.
  int count(int64_t panel) const { return layout_.source(panel).count; }

 private:
  template <int ROWS>
  void multiply(int row, const Step& step) {
    const int64_t depth = scores_.packed.depth;
    const auto keys_of = [&](int n) { return packed_keys_ + (step.first + n) * scores_.packed.keys; };
    multiply_panels<M, ROWS>(q_.data() + row * depth, depth, step.panels(), keys_of, block_.data(), SCORE_STRIDE);
  }

  const Scores<M, T>& scores_;
  const PanelLayout& layout_;
  const Unit* const packed_keys_;
  int64_t key_head_ = 0;
  int rows_ = 0;
  std::vector<Unit> q_;
  std::vector<float> block_;
};

}  // namespace sparse_compile::block_mass
