// Attention over the key groups that a Plan keeps, and over pooled keys that stand for the others.
//
// Keys and values are packed once, in panels that belong to one group each (`cpu_call.h`); tiles of queries go through
// the panels that they keep (`cpu_tile.h`). Docs: docs/cpu.md; the definition of correct: reference.py.
#include "../cpp/dtypes.h"
#include "cpu_tile.h"

namespace sparse_compile {
namespace {

// The tiles of all query heads that read these key heads, one head after the other, its heaviest tiles first.
template <class M, typename T>
std::vector<Tile> list_tiles(const AttentionCall<M, T>& call, int64_t first, int64_t last) {
  const Grouping &queries = call.queries, &keys = call.keys;
  std::vector<Tile> tiles;
  for (int64_t head = first * call.shared; head < last * call.shared; ++head) {
    const int64_t key_head = head / call.shared;
    const auto begin = static_cast<std::ptrdiff_t>(tiles.size());
    for (int64_t group = 0; group < queries.groups; ++group) {
      const int64_t size = queries.size(head, group);
      if (size == 0) continue;
      int64_t panels = call.pooled_panels + 1;
      for (int64_t j = 0; j + 1 < keys.groups; ++j)
        if (call.keeps(head, group, j)) panels += call.layout->first(key_head, j + 1) - call.layout->first(key_head, j);
      // Even tiles, of whole small blocks of rows.
      const int64_t parts = (size + ROWS_AT_ONCE<M> - 1) / ROWS_AT_ONCE<M>;
      const int rows = rounded_up<M>(static_cast<int>((size + parts - 1) / parts));
      for (int64_t row = 0; row < size; row += rows) {
        const int own = static_cast<int>(std::min<int64_t>(rows, size - row));
        tiles.push_back({head, group, queries.start(head, group) + row, own, own * panels});
      }
    }
    std::stable_sort(tiles.begin() + begin, tiles.end(), [](const Tile& a, const Tile& b) { return a.cost > b.cost; });
  }
  return tiles;
}

template <class M, typename T>
void attend(AttentionCall<M, T>& call) {
  const int64_t at_once = heads_at_once(call.most_units() * sizeof(typename M::Unit));
  for (int64_t first = 0; first < call.key_heads; first += at_once) {
    const int64_t last = std::min(call.key_heads, first + at_once);
    call.pack(first, last);
    const std::vector<Tile> tiles = list_tiles(call, first, last);
    for_each_item(static_cast<int64_t>(tiles.size()), [&] {
      return [&tiles, worker = TileWorker<M, T>(call)](int64_t item) mutable { worker.attend(tiles[item]); };
    });
  }
}

}  // namespace

void attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const std::optional<at::Tensor>& q_order,
               const at::Tensor& q_offsets, const std::optional<at::Tensor>& k_order, const at::Tensor& k_offsets,
               const at::Tensor& keep, const std::optional<at::Tensor>& mean_k, const std::optional<at::Tensor>& mean_v,
               const std::optional<at::Tensor>& log_size, const std::optional<at::Tensor>& coupling, double scale,
               at::Tensor& out, at::Tensor& lse) {
  const Grouping queries(q_order, q_offsets, q), keys(k_order, k_offsets, k);
  TORCH_CHECK(keep.is_contiguous() && keep.size(0) * keep.size(1) == q.size(0) * q.size(1) &&
                  keep.size(2) == queries.groups && keep.size(3) * 32 >= keys.groups,
              "the bitmap of a Plan must have a row for each of ", queries.groups, " query groups and a bit for each",
              " of ", keys.groups, " key groups; got ", keep.sizes());
  const auto data = [](const std::optional<at::Tensor>& x) { return x ? x->const_data_ptr<float>() : nullptr; };
  const Pooled pooled{data(mean_k), data(mean_v), data(log_size), data(coupling)};
  with_types_of(q, [&]<class M, typename T>(M, T) {
    AttentionCall<M, T> call(q, k, v, queries, keys, keep, pooled, scale, out, lse);
    attend(call);
  });
}

}  // namespace sparse_compile
