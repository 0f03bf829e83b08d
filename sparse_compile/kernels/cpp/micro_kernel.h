// The one inner loop of all products: a block of rows, kept in registers, times packed panels.
#pragma once

#include "tiles.h"

namespace sparse_compile {

#if defined(__AVX512F__)
constexpr int MOST_ROWS = 12, FEWEST_ROWS = 4;  // 24 of 32 registers hold sums
#else
constexpr int MOST_ROWS = 6, FEWEST_ROWS = 2;  // 12 of 16
#endif

// Rows of a block of sums: most of them, and of those at the end. Products without tiles take any mode's rows.
template <class M>
constexpr int BLOCK_ROWS = USES_TILES<M> ? 32 : MOST_ROWS;
template <class M>
constexpr int LAST_ROWS = USES_TILES<M> ? 16 : FEWEST_ROWS;

// Cut rows into blocks of BLOCK_ROWS, and what is left into blocks of LAST_ROWS: `visit(constant rows, first row)`.
template <class M = Float32, class Visit>
inline void for_row_blocks(int rows, Visit visit) {
  constexpr int MOST = BLOCK_ROWS<M>, LAST = LAST_ROWS<M>;
  int row = 0;
  for (; row + MOST <= rows; row += MOST) visit(std::integral_constant<int, MOST>{}, row);
  for (; row < rows; row += LAST) visit(std::integral_constant<int, LAST>{}, row);
}

template <class M = Float32>
inline int rounded_up(int rows) {
  return (rows + LAST_ROWS<M> - 1) / LAST_ROWS<M> * LAST_ROWS<M>;
}

// What a thread works on at once: rows of a tile, whose operands stay in the second-level cache with those of a step of
// keys; and the scores of a block of rows in a step, which stay in the first-level cache.
template <class M>
constexpr int ROWS_AT_ONCE = 12 * MOST_ROWS / BLOCK_ROWS<M> * BLOCK_ROWS<M>;
constexpr int KEYS_AT_ONCE = 256, PANELS_AT_ONCE = KEYS_AT_ONCE / PANEL;
constexpr int SCORE_STRIDE = KEYS_AT_ONCE + LANES;  // rows fall on different sets of the cache

// Cut panels into even steps of at most PANELS_AT_ONCE: `visit(first, behind last)`.
template <class Visit>
inline void for_even_steps(int64_t panels, Visit visit) {
  const int64_t steps = (panels + PANELS_AT_ONCE - 1) / PANELS_AT_ONCE;
  for (int64_t step = 0; step < steps; ++step) visit(panels * step / steps, panels * (step + 1) / steps);
}

constexpr int64_t SEGMENT = 128;  // of a long depth: sums of sums lose fewer digits than one sum

// scores [ROWS, PANELS * PANEL] = rows [ROWS, depth] times the keys of one or two panels, wherever they lie.
template <class M, int ROWS, int PANELS>
__attribute__((noinline)) void multiply_keys(const typename M::Unit* rows, int64_t row_stride,
                                             const typename M::Unit* first, const typename M::Unit* second,
                                             int64_t depth, float* scores, int64_t score_stride) {
#if defined(SPARSE_COMPILE_TILES)
  if constexpr (USES_TILES<M> && ROWS % TILE_ROWS == 0)
    return multiply_keys_by_tiles<ROWS, PANELS>(rows, row_stride, first, second, depth, scores, score_stride);
#endif
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

// scores [ROWS, count * PANEL] = rows [ROWS, depth] times the keys of the panels `keys_of(0)` to `keys_of(count - 1)`.
template <class M, int ROWS, class KeysOf>
inline void multiply_panels(const typename M::Unit* rows, int64_t depth, int count, KeysOf keys_of, float* scores,
                            int64_t score_stride) {
  int n = 0;
  for (; n + 1 < count; n += 2)
    multiply_keys<M, ROWS, 2>(rows, depth, keys_of(n), keys_of(n + 1), depth, scores + n * PANEL, score_stride);
  if (n < count)
    multiply_keys<M, ROWS, 1>(rows, depth, keys_of(n), keys_of(n), depth, scores + n * PANEL, score_stride);
}

// sums [ROWS, CHUNK] = factors [ROWS] * sums + weights [ROWS, panels * PANEL] times one chunk of the panels' values.
template <class M, int ROWS>
__attribute__((noinline)) void add_values(const typename M::Unit* weights, int64_t weight_stride,
                                          const typename M::Unit* const* panels, int count, int64_t offset,
                                          const float* factors, float* sums, int64_t sum_stride) {
#if defined(SPARSE_COMPILE_TILES)
  if constexpr (USES_TILES<M> && ROWS % TILE_ROWS == 0)
    return add_values_by_tiles<ROWS>(weights, weight_stride, panels, count, offset, factors, sums, sum_stride);
#endif
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
