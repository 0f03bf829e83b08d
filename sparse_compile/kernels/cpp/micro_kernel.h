// The one inner loop of all products: a block of rows, kept in registers, times packed panels.
#pragma once

#include "panels.h"

namespace sparse_compile {

#if defined(__AVX512F__)
constexpr int MOST_ROWS = 12, FEWEST_ROWS = 4;  // 24 of 32 registers hold sums
#else
constexpr int MOST_ROWS = 6, FEWEST_ROWS = 2;  // 12 of 16
#endif

// Cut rows into blocks of MOST_ROWS, and what is left into blocks of FEWEST_ROWS: `visit(constant rows, first row)`.
template <class Visit>
inline void for_row_blocks(int rows, Visit visit) {
  int row = 0;
  for (; row + MOST_ROWS <= rows; row += MOST_ROWS) visit(std::integral_constant<int, MOST_ROWS>{}, row);
  for (; row < rows; row += FEWEST_ROWS) visit(std::integral_constant<int, FEWEST_ROWS>{}, row);
}

inline int rounded_up(int rows) { return (rows + FEWEST_ROWS - 1) / FEWEST_ROWS * FEWEST_ROWS; }

constexpr int64_t SEGMENT = 128;  // of a long depth: sums of sums lose fewer digits than one sum

// scores [ROWS, PANELS * PANEL] = rows [ROWS, depth] times the keys of one or two panels, wherever they lie.
template <class M, int ROWS, int PANELS>
__attribute__((noinline)) void multiply_keys(const typename M::Unit* rows, int64_t row_stride,
                                             const typename M::Unit* first, const typename M::Unit* second,
                                             int64_t depth, float* scores, int64_t score_stride) {
  const typename M::Unit* const keys[2] = {first, second};
  int64_t begin = 0;
  do {
    const int64_t end = std::min(depth, begin + SEGMENT);
    Vector sums[ROWS][PANELS] = {};
    for (int64_t k = begin; k < end; ++k) {
#pragma GCC unroll 32
      for (int i = 0; i < ROWS * PANELS; ++i) {
        const int row = i / PANELS, panel = i % PANELS;
        sums[row][panel] = M::multiply_add(sums[row][panel], rows[row * row_stride + k], keys[panel] + k * PANEL);
      }
    }
#pragma GCC unroll 32
    for (int i = 0; i < ROWS * PANELS; ++i) {
      float* to = scores + i / PANELS * score_stride + i % PANELS * PANEL;
      store(to, begin ? load(to) + sums[i / PANELS][i % PANELS] : sums[i / PANELS][i % PANELS]);
    }
    begin = end;
  } while (begin < depth);
}

// sums [ROWS, CHUNK] = factors [ROWS] * sums + weights [ROWS, panels * PANEL] times one chunk of the panels' values.
template <class M, int ROWS>
__attribute__((noinline)) void add_values(const typename M::Unit* weights, int64_t weight_stride,
                                          const typename M::Unit* const* panels, int count, int64_t offset,
                                          const float* factors, float* sums, int64_t sum_stride) {
  constexpr int VECTORS = CHUNK / LANES, DEPTH = Packed<M>::PANEL_DEPTH;
  Vector total[ROWS][VECTORS];
#pragma GCC unroll 32
  for (int i = 0; i < ROWS * VECTORS; ++i)
    total[i / VECTORS][i % VECTORS] =
        splat(factors[i / VECTORS]) * load(sums + i / VECTORS * sum_stride + i % VECTORS * LANES);
  for (int n = 0; n < count; ++n) {
    const typename M::Unit* values = panels[n] + offset;
    for (int k = 0; k < DEPTH; ++k, ++weights, values += CHUNK) {
#pragma GCC unroll 32
      for (int i = 0; i < ROWS * VECTORS; ++i) {
        const int row = i / VECTORS, part = i % VECTORS;
        total[row][part] = M::multiply_add(total[row][part], weights[row * weight_stride], values + part * LANES);
      }
    }
  }
#pragma GCC unroll 32
  for (int i = 0; i < ROWS * VECTORS; ++i)
    store(sums + i / VECTORS * sum_stride + i % VECTORS * LANES, total[i / VECTORS][i % VECTORS]);
}

}  // namespace sparse_compile
