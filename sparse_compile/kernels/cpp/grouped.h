// Keys and values of one head, packed group by group: every group begins a panel of its own.
//
// A row of a Plan keeps or skips whole groups, so that a panel is attended to as a whole or not at all, and only the
// last panel of a group has absent keys. Groups of any size and place cost at most PANEL - 1 keys more than they have.
#pragma once

#include <ATen/ATen.h>

#include <vector>

#include "panels.h"
#include "threads.h"

namespace sparse_compile {

// Where the tokens of one side of a Plan lie: order int32 [heads, tokens] or null, offsets int32 [heads, groups + 1],
// heads counted over the batch.
struct Grouping {
  const int32_t* order;
  const int32_t* offsets;
  int64_t tokens;
  int64_t groups;

  // `x` [batch, heads, tokens, ...] is what is grouped.
  Grouping(const std::optional<at::Tensor>& order_, const at::Tensor& offsets_, const at::Tensor& x)
      : order(order_ ? order_->const_data_ptr<int32_t>() : nullptr),
        offsets(offsets_.const_data_ptr<int32_t>()),
        tokens(x.size(2)),
        groups(offsets_.size(2) - 1) {
    TORCH_CHECK(offsets_.is_contiguous() && (!order_ || order_->is_contiguous()), "orders and offsets must be dense");
    const int64_t heads = x.size(0) * x.size(1);
    TORCH_CHECK(offsets_.size(0) * offsets_.size(1) == heads, "a Plan must have offsets for ", heads, " heads");
    for (int64_t head = 0; head < heads; ++head) {
      bool inside = start(head, 0) == 0 && start(head, groups) == tokens;
      for (int64_t group = 0; group < groups; ++group) inside &= size(head, group) >= 0;
      TORCH_CHECK(inside, "offsets of a Plan must rise from 0 to the ", tokens, " tokens; those of head ", head,
                  " do not");
    }
    if (!order) return;
    TORCH_CHECK(order_->numel() == heads * tokens, "the order of a Plan must have ", tokens, " tokens a head");
    for (int64_t head = 0; head < heads; ++head) {
      std::vector<bool> named(tokens);
      for (int64_t position = 0; position < tokens; ++position) {
        const int64_t own = token(head, position);
        TORCH_CHECK(own >= 0 && own < tokens && !named[own], "the order of a Plan must name tokens from 0 to ",
                    tokens - 1, ", each once; head ", head, " has ", own, " at ", position);
        named[own] = true;
      }
    }
  }

  int64_t start(int64_t head, int64_t group) const { return offsets[head * (groups + 1) + group]; }
  int64_t size(int64_t head, int64_t group) const { return start(head, group + 1) - start(head, group); }
  // The token at a position of the grouped order.
  int64_t token(int64_t head, int64_t position) const { return order ? order[head * tokens + position] : position; }
};

// A tensor [batch, heads, tokens, size], the last dimension dense, by rows.
template <typename T>
struct Rows {
  T* data;
  int64_t heads, batch_stride, head_stride, row_stride;

  explicit Rows(const at::Tensor& x) : Rows(x, const_cast<void*>(x.const_data_ptr())) {}
  explicit Rows(at::Tensor& x) : Rows(x, x.mutable_data_ptr()) {}  // to be written

  T* row(int64_t head, int64_t token) const {
    return data + head / heads * batch_stride + head % heads * head_stride + token * row_stride;
  }

 private:
  Rows(const at::Tensor& x, void* start)
      : data(static_cast<T*>(start)),
        heads(x.size(1)),
        batch_stride(x.stride(0)),
        head_stride(x.stride(1)),
        row_stride(x.stride(2)) {
    constexpr auto dtype = c10::CppTypeToScalarType<T>::value;
    TORCH_CHECK(x.scalar_type() == dtype, "the tensors must share a dtype; got ", x.scalar_type(), " and ", dtype);
    TORCH_CHECK(x.size(3) < 2 || x.stride(3) == 1, "the last dimension must be dense");
  }
};

struct PanelSource {
  int64_t head, position;  // of the first key, in the grouped order of its head
  int count;
};

// Which panels the groups of a range of heads are cut into; the last group, padding, has none.
class PanelLayout {
 public:
  PanelLayout(const Grouping& keys, int64_t first_head, int64_t last_head)
      : groups_(keys.groups), first_head_(first_head) {
    for (int64_t head = first_head; head < last_head; ++head) {
      for (int64_t group = 0; group < keys.groups; ++group) {
        first_.push_back(static_cast<int64_t>(sources_.size()));
        const int64_t stop = group + 1 < keys.groups ? keys.start(head, group + 1) : keys.start(head, group);
        for (int64_t position = keys.start(head, group); position < stop; position += PANEL)
          sources_.push_back({head, position, static_cast<int>(std::min<int64_t>(PANEL, stop - position))});
      }
    }
    first_.push_back(static_cast<int64_t>(sources_.size()));
  }

  int64_t panels() const { return static_cast<int64_t>(sources_.size()); }
  const PanelSource& source(int64_t panel) const { return sources_[panel]; }
  // The panels of a group are [first(head, group), first(head, group + 1)).
  int64_t first(int64_t head, int64_t group) const { return first_[(head - first_head_) * groups_ + group]; }

 private:
  int64_t groups_, first_head_;
  std::vector<PanelSource> sources_;
  std::vector<int64_t> first_;
};

constexpr int64_t PANELS_AN_ITEM = 32;  // some 100 microseconds of packing

// Pack the panels of a layout: keys to `keys + panel * packed.keys`, and values likewise, unless `values` is null.
template <class M, typename T>
void pack_panels(const PanelLayout& layout, const Grouping& grouping, const Rows<T>& k, const Rows<T>& v,
                 int64_t key_size, int64_t value_size, const Packed<M>& packed, typename M::Unit* keys,
                 typename M::Unit* values) {
  const int64_t items = (layout.panels() + PANELS_AN_ITEM - 1) / PANELS_AN_ITEM;
  for_each_item(items, [&] {
    return [&, scratch = std::vector<typename M::Unit>(PANEL * packed.depth)](int64_t item) mutable {
      const int64_t stop = std::min(layout.panels(), (item + 1) * PANELS_AN_ITEM);
      for (int64_t panel = item * PANELS_AN_ITEM; panel < stop; ++panel) {
        const PanelSource& source = layout.source(panel);
        const T *key_rows[PANEL], *value_rows[PANEL];
        for (int n = 0; n < source.count; ++n) {
          const int64_t token = grouping.token(source.head, source.position + n);
          key_rows[n] = k.row(source.head, token);
          value_rows[n] = v.row(source.head, token);
        }
        pack_keys<M>(keys + panel * packed.keys, key_rows, source.count, key_size, packed, scratch.data());
        if (values) pack_values<M>(values + panel * packed.values, value_rows, source.count, value_size, packed);
      }
    };
  });
}

constexpr int64_t WORKSPACE_BYTES = int64_t(128) << 20;

// How many heads share the workspace, if each takes so many bytes: at least one, whatever it takes.
inline int64_t heads_at_once(int64_t bytes_a_head) {
  return std::max<int64_t>(1, WORKSPACE_BYTES / std::max<int64_t>(1, bytes_a_head));
}

// Memory kept by the calling thread between calls, at least `bytes`: fresh pages cost more than packing into them.
inline char* workspace(int64_t bytes) {
  static thread_local at::Tensor kept;
  if (!kept.defined() || kept.numel() < bytes) {
    kept.reset();  // before there is more
    kept = at::empty({bytes}, at::kByte);
  }
  return static_cast<char*>(kept.data_ptr());
}

}  // namespace sparse_compile
