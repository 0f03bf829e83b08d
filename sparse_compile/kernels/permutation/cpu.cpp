// Tokens of all heads sorted by label. The definition of correct: reference.py.
#include "../cpp/group_means.h"

namespace sparse_compile {

// labels int32 [batch, heads, tokens]; order int32 of their shape, offsets int32 [batch, heads, groups + 1]; all dense.
void sort_labels(const at::Tensor& labels, at::Tensor& order, at::Tensor& offsets) {
  const int64_t heads = labels.size(0) * labels.size(1), tokens = labels.size(2), groups = offsets.size(2) - 1;
  const int32_t* label = labels.const_data_ptr<int32_t>();
  int32_t *sorted = order.mutable_data_ptr<int32_t>(), *bounds = offsets.mutable_data_ptr<int32_t>();
  for_each_item(heads, [&] {
    return [&](int64_t head) {
      const int32_t* own = label + head * tokens;
      sort_by_label(tokens, groups, [&](int64_t token) { return own[token]; }, sorted + head * tokens,
                    bounds + head * (groups + 1));
    };
  });
}

}  // namespace sparse_compile
