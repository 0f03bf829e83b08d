// Tokens grouped by label, and the mean of each group.
#pragma once

#include "grouped.h"

namespace sparse_compile {

// A stable counting sort of the tokens of one head by `label_of(token)`, which lies in [0, groups): order int32
// [tokens], the token at each position, and offsets int32 [groups + 1], the bounds of the labels among the positions.
template <class LabelOf>
void sort_by_label(int64_t tokens, int64_t groups, LabelOf label_of, int32_t* order, int32_t* offsets) {
  std::fill_n(offsets, groups + 1, 0);
  for (int64_t token = 0; token < tokens; ++token) {
    const int64_t label = label_of(token);
    TORCH_CHECK(label >= 0 && label < groups, "labels must lie between 0 and ", groups - 1, "; got ", label);
    ++offsets[label + 1];
  }
  for (int64_t group = 0; group < groups; ++group) offsets[group + 1] += offsets[group];
  std::vector<int32_t> next(offsets, offsets + groups);
  for (int64_t token = 0; token < tokens; ++token) order[next[label_of(token)]++] = static_cast<int32_t>(token);
}

constexpr int64_t ROWS_AHEAD = 8;

// Ask for a row that is needed ROWS_AHEAD rows later: the hardware does not look there by itself where rows are in the
// grouped order, or other heads lie between them. (GCC removes a function that only prefetches, unless inlined first.)
template <typename T>
__attribute__((always_inline)) inline void prefetch(const T* row, int64_t size) {
  for (int64_t c = 0; c < size; c += 64 / sizeof(T)) __builtin_prefetch(row + c);
}

// The row of a token some positions ahead in the grouped order.
template <typename T>
__attribute__((always_inline)) inline void prefetch_after(const Rows<T>& x, int64_t size, const Grouping& grouping,
                                                          int64_t head, int64_t position) {
  prefetch(x.row(head, grouping.token(head, std::min(position + ROWS_AHEAD, grouping.tokens - 1))), size);
}

constexpr int64_t GROUPS_AN_ITEM = 8;

// The mean of the tokens of each group but the last, to `means + (head * rows + group) * size`; where a group is empty,
// what lies there stays. Sums run in the grouped order in float64, where a million terms still round to the right
// float32; a group is one thread's work from end to end.
template <typename T>
void group_means(const Rows<T>& x, int64_t size, const Grouping& grouping, int64_t heads, float* means, int64_t rows) {
  const int64_t own = grouping.groups - 1, items_a_head = (own + GROUPS_AN_ITEM - 1) / GROUPS_AN_ITEM;
  for_each_item(heads * items_a_head, [&] {
    return [&, sums = std::vector<double>(size)](int64_t item) mutable {
      const int64_t head = item / items_a_head, first = item % items_a_head * GROUPS_AN_ITEM;
      for (int64_t group = first; group < std::min(own, first + GROUPS_AN_ITEM); ++group) {
        const int64_t count = grouping.size(head, group);
        if (!count) continue;
        std::fill(sums.begin(), sums.end(), 0.);
        for (int64_t position = grouping.start(head, group); position < grouping.start(head, group + 1); ++position) {
          prefetch_after(x, size, grouping, head, position);
          const T* token = x.row(head, grouping.token(head, position));
          for (int64_t c = 0; c < size; ++c) sums[c] += static_cast<float>(token[c]);
        }
        float* mean = means + (head * rows + group) * size;
        for (int64_t c = 0; c < size; ++c) mean[c] = static_cast<float>(sums[c] / static_cast<double>(count));
      }
    };
  });
}

}  // namespace sparse_compile
