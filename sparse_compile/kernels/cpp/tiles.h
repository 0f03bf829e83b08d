// The two products of the micro-kernel on the tile registers of AMX, for pairs of bfloat16.
//
// Operands lie in memory as for AVX512-BF16. A panel has 16 keys: a tile of values is 8 pairs of keys deep, half of
// what the hardware takes at once; for one shape of all tiles, scores are made at that depth too.
//
// With SPARSE_COMPILE_EMULATED_TILES the tile instructions are functions, so that this file is tested on any CPU.
#pragma once

#include "panels.h"

#if defined(SPARSE_COMPILE_EMULATED_TILES)
#include "emulated_tiles.h"
#endif
#if defined(__AMX_BF16__) || defined(SPARSE_COMPILE_EMULATED_TILES)
#define SPARSE_COMPILE_TILES
#endif

namespace sparse_compile {

#if defined(SPARSE_COMPILE_TILES)
static_assert(LANES == 16, "tiles are a register of AVX-512 wide");
constexpr bool HAVE_TILES = true;

constexpr int TILE_ROWS = 16, TILE_DEPTH = 8;  // units

// What the compiler holds in registers has to be in memory before tiles are loaded: it does not know what they read.
inline void finish_stores() { __asm__ volatile("" ::: "memory"); }

// Tiles 0 to 3 hold sums, 4 and 5 rows, 6 and 7 panels. A thread has to ask for them before it uses any.
inline void configure_tiles() {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes_a_row[16] = {64, 64, 64, 64, 4 * TILE_DEPTH, 4 * TILE_DEPTH, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, TILE_DEPTH, TILE_DEPTH};
  } config;
  finish_stores();
  _tile_loadconfig(&config);
}

inline void release_tiles() { _tile_release(); }

// scores [ROWS, PANELS * 16]: see `multiply_keys`.
template <int ROWS, int PANELS>
void multiply_keys_by_tiles(const uint32_t* rows, int64_t row_stride, const uint32_t* first, const uint32_t* second,
                            int64_t depth, float* scores, int64_t score_stride) {
  const int64_t row_bytes = row_stride * 4, score_bytes = score_stride * 4;
  finish_stores();
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t k = 0; k < depth; k += TILE_DEPTH) {
    _tile_loadd(4, rows + k, row_bytes);
    _tile_loadd(6, first + k * PANEL, 64);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (PANELS == 2) {
      _tile_loadd(7, second + k * PANEL, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (ROWS == 2 * TILE_ROWS) {
      _tile_loadd(5, rows + TILE_ROWS * row_stride + k, row_bytes);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (PANELS == 2) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, scores, score_bytes);
  if constexpr (PANELS == 2) _tile_stored(1, scores + PANEL, score_bytes);
  if constexpr (ROWS == 2 * TILE_ROWS) {
    _tile_stored(2, scores + TILE_ROWS * score_stride, score_bytes);
    if constexpr (PANELS == 2) _tile_stored(3, scores + TILE_ROWS * score_stride + PANEL, score_bytes);
  }
}

// sums [ROWS, 32]: see `add_values`.
template <int ROWS>
void add_values_by_tiles(const uint32_t* weights, int64_t weight_stride, const uint32_t* const* panels, int count,
                         int64_t offset, const float* factors, float* sums, int64_t sum_stride) {
  for (int row = 0; row < ROWS; ++row)
    for (int part = 0; part < CHUNK; part += LANES) {
      float* sum = sums + row * sum_stride + part;
      store(sum, splat(factors[row]) * load(sum));
    }
  const int64_t weight_bytes = weight_stride * 4, sum_bytes = sum_stride * 4;
  float* const below = sums + TILE_ROWS * sum_stride;
  finish_stores();
  _tile_loadd(0, sums, sum_bytes);
  _tile_loadd(1, sums + LANES, sum_bytes);
  if constexpr (ROWS == 2 * TILE_ROWS) {
    _tile_loadd(2, below, sum_bytes);
    _tile_loadd(3, below + LANES, sum_bytes);
  }
  for (int n = 0; n < count; ++n, weights += TILE_DEPTH) {
    const uint32_t* values = panels[n] + offset;
    _tile_loadd(6, values, CHUNK * 4);
    _tile_loadd(7, values + LANES, CHUNK * 4);
    _tile_loadd(4, weights, weight_bytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (ROWS == 2 * TILE_ROWS) {
      _tile_loadd(5, weights + TILE_ROWS * weight_stride, weight_bytes);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sums, sum_bytes);
  _tile_stored(1, sums + LANES, sum_bytes);
  if constexpr (ROWS == 2 * TILE_ROWS) {
    _tile_stored(2, below, sum_bytes);
    _tile_stored(3, below + LANES, sum_bytes);
  }
}

#else
constexpr bool HAVE_TILES = false;

inline void configure_tiles() {}
inline void release_tiles() {}
#endif

// Whether products of this mode go through tiles, which are 16 rows high.
template <class M>
constexpr bool USES_TILES = HAVE_TILES && std::is_same_v<M, Bfloat16Pairs>;

}  // namespace sparse_compile
