// The tile instructions of AMX as functions, in float32: for tests on CPUs without AMX.
//
// Rows and bytes a row are those of the configuration, as in Intel's manual (volume 1, chapter 18).
#pragma once

#include <c10/util/Exception.h>

#include <cstdint>
#include <cstring>

namespace sparse_compile {

struct EmulatedTile {
  int rows = 0, bytes = 0;
  uint8_t data[16][64] = {};
};
inline thread_local EmulatedTile emulated_tiles[8];

inline void configure_emulated(const void* config) {
  const auto* bytes = static_cast<const uint8_t*>(config);
  for (int tile = 0; tile < 8; ++tile) {
    uint16_t width;
    std::memcpy(&width, bytes + 16 + 2 * tile, 2);
    emulated_tiles[tile] = {bytes[48 + tile], width, {}};
  }
}

inline void release_emulated() {
  for (EmulatedTile& tile : emulated_tiles) tile = {};
}

// A tile that was not configured is an illegal instruction on a CPU.
inline EmulatedTile& configured(int tile) {
  TORCH_CHECK(emulated_tiles[tile].rows > 0, "tile ", tile, " is not configured");
  return emulated_tiles[tile];
}

inline void zero_emulated(int tile) { std::memset(emulated_tiles[tile].data, 0, sizeof emulated_tiles[tile].data); }

inline void load_emulated(int tile, const void* from, int64_t stride) {
  configured(tile);
  for (int row = 0; row < emulated_tiles[tile].rows; ++row)
    std::memcpy(emulated_tiles[tile].data[row], static_cast<const char*>(from) + row * stride,
                emulated_tiles[tile].bytes);
}

inline void store_emulated(int tile, void* to, int64_t stride) {
  for (int row = 0; row < emulated_tiles[tile].rows; ++row)
    std::memcpy(static_cast<char*>(to) + row * stride, emulated_tiles[tile].data[row], emulated_tiles[tile].bytes);
}

inline float emulated_bfloat16(const uint8_t* from) {
  uint16_t half;
  std::memcpy(&half, from, 2);
  const uint32_t bits = uint32_t(half) << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline void multiply_emulated(int sums, int left, int right) {
  EmulatedTile &c = configured(sums), &a = configured(left), &b = configured(right);
  for (int m = 0; m < c.rows; ++m)
    for (int k = 0; k < a.bytes / 4; ++k)
      for (int n = 0; n < c.bytes / 4; ++n) {
        float sum;
        std::memcpy(&sum, c.data[m] + 4 * n, 4);
        sum += emulated_bfloat16(a.data[m] + 4 * k) * emulated_bfloat16(b.data[k] + 4 * n);
        sum += emulated_bfloat16(a.data[m] + 4 * k + 2) * emulated_bfloat16(b.data[k] + 4 * n + 2);
        std::memcpy(c.data[m] + 4 * n, &sum, 4);
      }
}

}  // namespace sparse_compile

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig(config) sparse_compile::configure_emulated(config)
#define _tile_release() sparse_compile::release_emulated()
#define _tile_zero(tile) sparse_compile::zero_emulated(tile)
#define _tile_loadd(tile, from, stride) sparse_compile::load_emulated(tile, from, stride)
#define _tile_stored(tile, to, stride) sparse_compile::store_emulated(tile, to, stride)
#define _tile_dpbf16ps(sums, left, right) sparse_compile::multiply_emulated(sums, left, right)
