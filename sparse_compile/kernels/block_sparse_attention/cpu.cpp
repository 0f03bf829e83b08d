// Attention over the key groups that a Plan keeps, and over pooled keys that stand for the others.
//
// Keys and values are packed once, in panels that belong to one group each. A tile is at most ROWS_AT_ONCE queries of a
// group; it goes through its panels in steps that stay in the second-level cache, and in each step through its rows in
// blocks whose scores stay in the first-level cache: scores, online softmax, values (FlashAttention-2, arXiv
// 2307.08691). Docs: docs/cpu.md; the definition of correct: reference.py.
#include <cmath>

#include "../cpp/grouped.h"
#include "../cpp/micro_kernel.h"

namespace sparse_compile {
namespace {

template <class M>
constexpr int ROWS_AT_ONCE = 12 * MOST_ROWS / BLOCK_ROWS<M> * BLOCK_ROWS<M>;
constexpr int KEYS_AT_ONCE = 256, PANELS_AT_ONCE = KEYS_AT_ONCE / PANEL;
constexpr int SCORE_STRIDE = KEYS_AT_ONCE + LANES;  // rows fall on different sets of the cache
constexpr int64_t WORKSPACE_BYTES = int64_t(128) << 20;  // of packed heads at once, unless one head needs more

// Tensors of `sparse_compile.plan.PooledKeys`, float32 and dense.
struct Pooled {
  const float *mean_k, *mean_v, *log_size, *coupling;  // all null, or the last one
};

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

template <class M, typename T>
class Attention {
  using Unit = typename M::Unit;

 public:
  Attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const Grouping& queries,
            const Grouping& keys, const at::Tensor& keep, const Pooled& pooled, double scale, at::Tensor& out,
            at::Tensor& lse)
      : q_(q), k_(k), v_(v), out_(out), lse_(lse.mutable_data_ptr<float>()), queries_(queries), keys_(keys),
        keep_(keep.const_data_ptr<int32_t>()), words_(keep.size(3)), pooled_(pooled), size_(q.size(3)),
        value_size_(v.size(3)), heads_(q.size(0) * q.size(1)), key_heads_(k.size(0) * k.size(1)),
        shared_(q.size(1) / k.size(1)), packed_(size_, value_size_),
        // Scores are multiplied by a scale above 0; what it lacks goes into the queries.
        sign_(scale > 0 ? 1.f : scale < 0 ? -1.f : 0.f), scale_(scale == 0 ? 1.f : std::abs(float(scale))) {
    for (int count = 0; count <= PANEL; ++count)
      for (int n = 0; n < PANEL; ++n) present_[count][n] = n < count ? 0.f : -INF;
    pooled_panels_ = pooled.mean_k ? (keys.groups + PANEL - 1) / PANEL : 0;
    coupling_panels_ = pooled.coupling ? (size_ + PANEL - 1) / PANEL : 0;
  }

  void run() {
    // No group needs more than one panel that is not full.
    const int64_t most_panels = keys_.tokens / PANEL + keys_.groups + pooled_panels_;
    const int64_t units = most_panels * (packed_.keys + packed_.values) + coupling_panels_ * packed_.values;
    const int64_t at_once = std::max<int64_t>(1, WORKSPACE_BYTES / std::max<int64_t>(1, units * sizeof(Unit)));
    for (int64_t first = 0; first < key_heads_; first += at_once) {
      const int64_t last = std::min(key_heads_, first + at_once);
      const PanelLayout layout(keys_, first, last);
      pack(layout, first, last);
      const std::vector<Tile> tiles = list_tiles(layout, first, last);
      for_each_item(static_cast<int64_t>(tiles.size()), [&] {
        return [&, worker = Worker(*this)](int64_t item) mutable { worker.attend(tiles[item], layout, first); };
      });
    }
  }

 private:
  class Worker;

  void pack(const PanelLayout& layout, int64_t first, int64_t last) {
    const int64_t heads = last - first, panels = layout.panels();
    const int64_t key_units = (panels + heads * pooled_panels_) * packed_.keys;
    const int64_t value_units = (panels + heads * (pooled_panels_ + coupling_panels_)) * packed_.values;
    packed_keys_ = reinterpret_cast<Unit*>(workspace((key_units + value_units) * sizeof(Unit)));
    packed_values_ = packed_keys_ + key_units;
    pooled_keys_ = packed_keys_ + panels * packed_.keys;
    pooled_values_ = packed_values_ + panels * packed_.values;
    packed_coupling_ = pooled_values_ + heads * pooled_panels_ * packed_.values;
    pack_panels<M, T>(layout, keys_, k_, v_, size_, value_size_, packed_, packed_keys_, packed_values_);
    if (!pooled_panels_) return;
    spoiled_.assign(heads, {});
    for_each_item(heads, [&] { return [&](int64_t own) { pack_pooled(first + own, own); }; });
  }

  // The pooled keys and values of a head, and its coupling matrix. Values that are not finite are kept apart.
  void pack_pooled(int64_t head, int64_t own) {
    const int64_t groups = keys_.groups;
    std::vector<Unit> scratch(PANEL * packed_.depth);
    std::vector<float> values(PANEL * value_size_), absent(size_, 0.f);
    for (int64_t panel = 0; panel < pooled_panels_; ++panel) {
      const float *key_rows[PANEL], *value_rows[PANEL];
      const int count = static_cast<int>(std::min<int64_t>(PANEL, groups - panel * PANEL));
      for (int n = 0; n < count; ++n) {
        const int64_t group = panel * PANEL + n;
        const bool there = can_stand_for(head, group);
        key_rows[n] = there ? pooled_.mean_k + (head * groups + group) * size_ : absent.data();
        value_rows[n] = values.data() + n * value_size_;
        bool finite = true;
        for (int64_t c = 0; c < value_size_; ++c) {
          const float x = there ? pooled_.mean_v[(head * groups + group) * value_size_ + c] : 0.f;
          values[n * value_size_ + c] = std::isfinite(x) ? x : 0.f;
          finite &= std::isfinite(x);
        }
        if (!finite) spoiled_[own].push_back(group);
      }
      const int64_t place = own * pooled_panels_ + panel;
      pack_keys<M>(pooled_keys_ + place * packed_.keys, key_rows, count, size_, packed_, scratch.data());
      pack_values<M>(pooled_values_ + place * packed_.values, value_rows, count, value_size_, packed_);
    }
    for (int64_t panel = 0; panel < coupling_panels_; ++panel) {
      const float* rows[PANEL];
      const int count = static_cast<int>(std::min<int64_t>(PANEL, size_ - panel * PANEL));
      for (int n = 0; n < count; ++n) rows[n] = pooled_.coupling + (head * size_ + panel * PANEL + n) * value_size_;
      pack_values<M>(packed_coupling_ + (own * coupling_panels_ + panel) * packed_.values, rows, count, value_size_,
                     packed_);
    }
  }

  // Whether a group has a pooled key that a row which skips it may see: no padding, not empty.
  bool can_stand_for(int64_t key_head, int64_t group) const {
    return group + 1 < keys_.groups && keys_.size(key_head, group) > 0 &&
           pooled_.log_size[key_head * keys_.groups + group] > -INF;
  }

  bool keeps(int64_t head, int64_t query_group, int64_t group) const {
    return keep_[(head * queries_.groups + query_group) * words_ + group / 32] >> group % 32 & 1;
  }

  // The tiles of all query heads that read these key heads, one head after the other, its heaviest tiles first.
  std::vector<Tile> list_tiles(const PanelLayout& layout, int64_t first, int64_t last) const {
    std::vector<Tile> tiles;
    for (int64_t head = first * shared_; head < last * shared_; ++head) {
      const auto begin = static_cast<std::ptrdiff_t>(tiles.size());
      for (int64_t group = 0; group < queries_.groups; ++group) {
        const int64_t size = queries_.size(head, group);
        if (size <= 0) continue;
        int64_t panels = pooled_panels_ + 1;
        for (int64_t j = 0; j + 1 < keys_.groups; ++j)
          if (keeps(head, group, j)) panels += layout.first(head / shared_, j + 1) - layout.first(head / shared_, j);
        // Even tiles, of whole small blocks of rows.
        const int64_t parts = (size + ROWS_AT_ONCE<M> - 1) / ROWS_AT_ONCE<M>;
        const int rows = rounded_up<M>(static_cast<int>((size + parts - 1) / parts));
        for (int64_t row = 0; row < size; row += rows) {
          const int own = static_cast<int>(std::min<int64_t>(rows, size - row));
          tiles.push_back({head, group, queries_.start(head, group) + row, own, own * panels});
        }
      }
      std::stable_sort(tiles.begin() + begin, tiles.end(),
                       [](const Tile& a, const Tile& b) { return a.cost > b.cost; });
    }
    return tiles;
  }

  const Rows<T> q_, k_, v_, out_;
  float* const lse_;
  const Grouping queries_, keys_;
  const int32_t* const keep_;
  const int64_t words_;
  const Pooled pooled_;
  const int64_t size_, value_size_, heads_, key_heads_, shared_;
  const Packed<M> packed_;
  const float sign_, scale_;
  int64_t pooled_panels_, coupling_panels_;
  float present_[PANEL + 1][PANEL];  // biases of panels by the number of their keys
  Unit *packed_keys_, *packed_values_, *pooled_keys_, *pooled_values_, *packed_coupling_;
  std::vector<std::vector<int64_t>> spoiled_;  // by key head of the chunk: groups with pooled values that are not finite
};

// One thread's part: its scratch memory, and the tile it is at.
template <class M, typename T>
class Attention<M, T>::Worker {
 public:
  explicit Worker(const Attention& call)
      : call_(call), channels_(call.packed_.chunks * CHUNK), q_(ROWS_AT_ONCE<M> * call.packed_.depth),
        scores_(BLOCK_ROWS<M> * SCORE_STRIDE), sums_(ROWS_AT_ONCE<M> * channels_), change_(BLOCK_ROWS<M> * channels_),
        peak_(ROWS_AT_ONCE<M>), total_(ROWS_AT_ONCE<M>), pooled_total_(ROWS_AT_ONCE<M>),
        pooled_bias_(call.pooled_panels_ * PANEL) {}

  void attend(const Tile& tile, const PanelLayout& layout, int64_t first_key_head) {
    const int64_t key_head = tile.head / call_.shared_, own = key_head - first_key_head;
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
    list_kept(tile, layout, key_head);
    add_panels();
    if (pooled && call_.coupling_panels_) add_coupling(own);
    if constexpr (USES_TILES<M>) release_tiles();
    write(tile);
    if (pooled && !call_.spoiled_[own].empty()) spoil(tile, key_head, own);
  }

 private:
  void load_queries(const Tile& tile) {
    const int64_t depth = call_.packed_.depth;
    std::fill_n(q_.data(), rows_ * depth, Unit(0));
    std::vector<T> turned(call_.sign_ == 1.f ? 0 : call_.size_);
    for (int row = 0; row < tile.rows; ++row) {
      const T* from = call_.q_.row(tile.head, call_.queries_.token(tile.head, tile.position + row));
      if (call_.sign_ != 1.f) {
        for (int64_t c = 0; c < call_.size_; ++c) turned[c] = static_cast<T>(static_cast<float>(from[c]) * call_.sign_);
        from = turned.data();
      }
      M::copy_row(q_.data() + row * depth, from, call_.size_);
    }
  }

  // Whether the tile skips anything that a pooled key stands for; padding queries see none.
  bool list_pooled(const Tile& tile, int64_t key_head, int64_t own) {
    list_.clear();
    if (tile.group + 1 == call_.queries_.groups) return false;
    for (int64_t panel = 0; panel < call_.pooled_panels_; ++panel) {
      float* bias = pooled_bias_.data() + panel * PANEL;
      bool any = false;
      for (int n = 0; n < PANEL; ++n) {
        const int64_t group = panel * PANEL + n;
        const bool seen = group < call_.keys_.groups && call_.can_stand_for(key_head, group) &&
                          !call_.keeps(tile.head, tile.group, group);
        bias[n] = seen ? call_.pooled_.log_size[key_head * call_.keys_.groups + group] / call_.scale_ : -INF;
        any |= seen;
      }
      const int64_t place = own * call_.pooled_panels_ + panel;
      if (any)
        list_.add(call_.pooled_keys_ + place * call_.packed_.keys, call_.pooled_values_ + place * call_.packed_.values,
                  bias);
    }
    return !list_.keys.empty();
  }

  void list_kept(const Tile& tile, const PanelLayout& layout, int64_t key_head) {
    list_.clear();
    for (int64_t group = 0; group + 1 < call_.keys_.groups; ++group) {
      if (!call_.keeps(tile.head, tile.group, group)) continue;
      for (int64_t panel = layout.first(key_head, group); panel < layout.first(key_head, group + 1); ++panel) {
        const int count = layout.source(panel).count;
        list_.add(call_.packed_keys_ + panel * call_.packed_.keys, call_.packed_values_ + panel * call_.packed_.values,
                  count == PANEL ? nullptr : call_.present_[count]);
      }
    }
  }

  // Go through the listed panels in even steps.
  void add_panels() {
    const int count = static_cast<int>(list_.keys.size());
    const int steps = (count + PANELS_AT_ONCE - 1) / PANELS_AT_ONCE;
    for (int step = 0; step < steps; ++step) {
      const int first = static_cast<int>(int64_t(count) * step / steps);
      const int last = static_cast<int>(int64_t(count) * (step + 1) / steps);
      for_row_blocks<M>(rows_, [&](auto rows, int row) { this->template add_block<rows()>(row, first, last - first); });
    }
  }

  template <int ROWS>
  void add_block(int row, int first, int count) {
    const int64_t depth = call_.packed_.depth;
    const Unit* q = q_.data() + row * depth;
    const Unit* const* keys = list_.keys.data() + first;
    for (int n = 0; n < count; n += 2) {
      float* scores = scores_.data() + n * PANEL;
      if (n + 1 < count)
        multiply_keys<M, ROWS, 2>(q, depth, keys[n], keys[n + 1], depth, scores, SCORE_STRIDE);
      else
        multiply_keys<M, ROWS, 1>(q, depth, keys[n], keys[n], depth, scores, SCORE_STRIDE);
    }
    for (int n = 0; n < count; ++n)
      if (const float* bias = list_.biases[first + n]) add_bias<ROWS>(scores_.data() + n * PANEL, load(bias));
    float factors[ROWS];
    for (int r = 0; r < ROWS; ++r) factors[r] = weigh(row + r, scores_.data() + r * SCORE_STRIDE, count);
    for (int64_t chunk = 0; chunk < call_.packed_.chunks; ++chunk)
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
    const float to_base_2 = call_.scale_ * LOG2_E;
    Vector even = load(scores), odd = even;
    for (int n = 1; n + 1 < count; n += 2) {
      even = maximum(even, load(scores + n * PANEL));
      odd = maximum(odd, load(scores + (n + 1) * PANEL));
    }
    if (count % 2 == 0) even = maximum(even, load(scores + (count - 1) * PANEL));
    const float peak = std::max(peak_[row], largest(maximum(even, odd)) * to_base_2);
    const float base = peak == -INF ? 0.f : peak;
    const float factor = std::exp2(peak_[row] - base);
    const auto weights = reinterpret_cast<Unit*>(scores);
    Vector sums[2] = {};
    for (int n = 0; n < count; ++n) {
      const Vector weight = exp2_of_negative(load(scores + n * PANEL) * splat(to_base_2) - splat(base));
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
    for (int64_t n = 0; n < call_.coupling_panels_; ++n)
      panels.push_back(call_.packed_coupling_ + (own * call_.coupling_panels_ + n) * call_.packed_.values);
    const int64_t depth = call_.packed_.depth;
    for_row_blocks<M>(rows_, [&](auto rows, int row) {
      std::fill_n(change_.data(), rows() * channels_, 0.f);
      const float factors[BLOCK_ROWS<M>] = {};
      for (int64_t chunk = 0; chunk < call_.packed_.chunks; ++chunk)
        add_values<M, rows()>(q_.data() + row * depth, depth, panels.data(), static_cast<int>(panels.size()),
                              chunk * Packed<M>::PANEL_DEPTH * CHUNK, factors, change_.data() + chunk * CHUNK,
                              channels_);
      for (int r = 0; r < rows(); ++r) {
        const float share = pooled_total_[row + r] * call_.scale_;
        for (int64_t c = 0; c < channels_; ++c) sums_[(row + r) * channels_ + c] += share * change_[r * channels_ + c];
      }
    });
  }

  void write(const Tile& tile) const {
    for (int row = 0; row < tile.rows; ++row) {
      const int64_t token = call_.queries_.token(tile.head, tile.position + row);
      T* to = call_.out_.row(tile.head, token);
      const bool any = total_[row] != 0.f;  // also where it is NaN
      const float share = any ? 1.f / total_[row] : 0.f;
      for (int64_t c = 0; c < call_.value_size_; ++c)
        to[c] = static_cast<T>(any ? sums_[row * channels_ + c] * share : 0.f);
      call_.lse_[tile.head * call_.queries_.tokens + token] =
          any ? (peak_[row] + std::log2(total_[row])) * LN_2 : -INF;
    }
  }

  // NaN in the channels where a pooled value that the tile sees is not finite.
  void spoil(const Tile& tile, int64_t key_head, int64_t own) const {
    for (const int64_t group : call_.spoiled_[own]) {
      if (call_.keeps(tile.head, tile.group, group)) continue;
      const float* values = call_.pooled_.mean_v + (key_head * call_.keys_.groups + group) * call_.value_size_;
      for (int row = 0; row < tile.rows; ++row) {
        T* to = call_.out_.row(tile.head, call_.queries_.token(tile.head, tile.position + row));
        for (int64_t c = 0; c < call_.value_size_; ++c)
          if (!std::isfinite(values[c])) to[c] = std::numeric_limits<float>::quiet_NaN();
      }
    }
  }

  const Attention& call_;
  const int64_t channels_;
  int rows_ = 0;
  std::vector<Unit> q_;
  std::vector<float> scores_, sums_, change_, peak_, total_, pooled_total_, pooled_bias_;
  PanelList<Unit> list_;
};

}  // namespace

void attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const std::optional<at::Tensor>& q_order,
               const at::Tensor& q_offsets, const std::optional<at::Tensor>& k_order, const at::Tensor& k_offsets,
               const at::Tensor& keep, const std::optional<at::Tensor>& mean_k, const std::optional<at::Tensor>& mean_v,
               const std::optional<at::Tensor>& log_size, const std::optional<at::Tensor>& coupling, double scale,
               at::Tensor& out, at::Tensor& lse) {
  const Grouping queries(q_order, q_offsets, q.size(2)), keys(k_order, k_offsets, k.size(2));
  const auto data = [](const std::optional<at::Tensor>& x) { return x ? x->const_data_ptr<float>() : nullptr; };
  const Pooled pooled{data(mean_k), data(mean_v), data(log_size), data(coupling)};
  const auto run = [&]<class M, typename T>(M, T) {
    Attention<M, T>(q, k, v, queries, keys, keep, pooled, scale, out, lse).run();
  };
  switch (q.scalar_type()) {
    case at::kFloat: return run(Float32{}, float{});
    case at::kHalf: return run(Float32{}, at::Half{});
    case at::kBFloat16: return run(Bfloat16{}, at::BFloat16{});
    default: TORCH_CHECK(false, "q must be float32, float16 or bfloat16, not ", q.scalar_type());
  }
}

}  // namespace sparse_compile
