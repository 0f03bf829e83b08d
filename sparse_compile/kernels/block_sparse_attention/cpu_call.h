// One call of attention: its tensors and plan, and the packed keys and values of the heads that are being worked on.
#pragma once

#include <cmath>
#include <optional>

#include "../cpp/grouped.h"
#include "../cpp/micro_kernel.h"

namespace sparse_compile {

constexpr double LEAST_SCALE = 1e-37;

// Tensors of `sparse_compile.plan.PooledKeys`, float32 and dense.
struct Pooled {
  const float *mean_k, *mean_v, *log_size, *coupling;  // all null, or the last one
};

template <class M, typename T>
struct AttentionCall {
  using Unit = typename M::Unit;

  AttentionCall(const at::Tensor& q_, const at::Tensor& k_, const at::Tensor& v_, const Grouping& queries_,
                const Grouping& keys_, const at::Tensor& keep_, const Pooled& pooled_, double scale_, at::Tensor& out_,
                at::Tensor& lse_)
      : q(q_), k(k_), v(v_), out(out_), lse(lse_.mutable_data_ptr<float>()), queries(queries_), keys(keys_),
        keep(keep_.const_data_ptr<int32_t>()), words(keep_.size(3)), pooled(pooled_), size(q_.size(3)),
        value_size(v_.size(3)), key_heads(k_.size(0) * k_.size(1)), shared(q_.size(1) / k_.size(1)),
        packed(size, value_size), sign(scale_ > LEAST_SCALE ? 1.f : scale_ < -LEAST_SCALE ? -1.f : 0.f),
        scale(std::abs(scale_) <= LEAST_SCALE ? 1.f : std::abs(static_cast<float>(scale_))),
        pooled_panels(pooled.mean_k ? (keys.groups + PANEL - 1) / PANEL : 0),
        coupling_panels(pooled.coupling ? (size + PANEL - 1) / PANEL : 0) {}

  // Most units that one key head takes: no group needs more than one panel that is not full.
  int64_t most_units() const {
    const int64_t panels = keys.tokens / PANEL + keys.groups + pooled_panels;
    return panels * (packed.keys + packed.values) + coupling_panels * packed.values;
  }

  // Make the key heads [first, last) the ones that are worked on.
  void pack(int64_t first, int64_t last) {
    first_key_head = first;
    layout.emplace(keys, first, last);
    const int64_t heads = last - first, panels = layout->panels();
    const int64_t key_units = (panels + heads * pooled_panels) * packed.keys;
    const int64_t value_units = (panels + heads * (pooled_panels + coupling_panels)) * packed.values;
    packed_keys = reinterpret_cast<Unit*>(workspace((key_units + value_units) * sizeof(Unit)));
    packed_values = packed_keys + key_units;
    pooled_keys = packed_keys + panels * packed.keys;
    pooled_values = packed_values + panels * packed.values;
    packed_coupling = pooled_values + heads * pooled_panels * packed.values;
    pack_panels<M, T>(*layout, keys, k, v, size, value_size, packed, packed_keys, packed_values);
    if (!pooled_panels) return;
    spoiled.assign(heads, {});
    for_each_item(heads, [&] { return [&](int64_t own) { pack_pooled(first + own, own); }; });
  }

  // Whether a group has a pooled key that a row which skips it may see: no padding, not empty.
  bool can_stand_for(int64_t key_head, int64_t group) const {
    return group + 1 < keys.groups && keys.size(key_head, group) > 0 &&
           pooled.log_size[key_head * keys.groups + group] > -INF;
  }

  bool keeps(int64_t head, int64_t query_group, int64_t group) const {
    return keep[(head * queries.groups + query_group) * words + group / 32] >> group % 32 & 1;
  }

  const Rows<T> q, k, v, out;
  float* const lse;
  const Grouping queries, keys;
  const int32_t* const keep;
  const int64_t words;
  const Pooled pooled;
  const int64_t size, value_size, key_heads, shared;
  const Packed<M> packed;
  // Scores are multiplied by a scale above 0; what it lacks goes into the queries. One too small to divide by is 0.
  const float sign, scale;
  const int64_t pooled_panels, coupling_panels;

  // Of the key heads that are worked on.
  int64_t first_key_head = 0;
  std::optional<PanelLayout> layout;
  Unit *packed_keys, *packed_values, *pooled_keys, *pooled_values, *packed_coupling;
  std::vector<std::vector<int64_t>> spoiled;  // groups with pooled values that are not finite

 private:
  // The pooled keys and values of a head, and its coupling matrix. Values that are not finite are kept apart.
  void pack_pooled(int64_t head, int64_t own) {
    const int64_t groups = keys.groups;
    std::vector<Unit> scratch(PANEL * packed.depth);
    std::vector<float> rows_of_values(PANEL * value_size), absent(size, 0.f);
    for (int64_t panel = 0; panel < pooled_panels; ++panel) {
      const float *key_rows[PANEL], *value_rows[PANEL];
      const int count = static_cast<int>(std::min<int64_t>(PANEL, groups - panel * PANEL));
      for (int n = 0; n < count; ++n) {
        const int64_t group = panel * PANEL + n;
        const bool there = can_stand_for(head, group);
        key_rows[n] = there ? pooled.mean_k + (head * groups + group) * size : absent.data();
        value_rows[n] = rows_of_values.data() + n * value_size;
        bool finite = true;
        for (int64_t c = 0; c < value_size; ++c) {
          const float x = there ? pooled.mean_v[(head * groups + group) * value_size + c] : 0.f;
          rows_of_values[n * value_size + c] = std::isfinite(x) ? x : 0.f;
          finite &= std::isfinite(x);
        }
        if (!finite) spoiled[own].push_back(group);
      }
      const int64_t place = own * pooled_panels + panel;
      pack_keys<M>(pooled_keys + place * packed.keys, key_rows, count, size, packed, scratch.data());
      pack_values<M>(pooled_values + place * packed.values, value_rows, count, value_size, packed);
    }
    for (int64_t panel = 0; panel < coupling_panels; ++panel) {
      const float* rows[PANEL];
      const int count = static_cast<int>(std::min<int64_t>(PANEL, size - panel * PANEL));
      for (int n = 0; n < count; ++n) rows[n] = pooled.coupling + (head * size + panel * PANEL + n) * value_size;
      pack_values<M>(packed_coupling + (own * coupling_panels + panel) * packed.values, rows, count, value_size,
                     packed);
    }
  }
};

}  // namespace sparse_compile
