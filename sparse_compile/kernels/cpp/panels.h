// Operands of the micro-kernel: how keys, values and queries lie in memory once they are packed.
//
// A panel is PANEL keys. Its keys are stored by components, its values by keys, in chunks of CHUNK channels; the
// micro-kernel then reads either from front to back. A unit is what one multiply-add of a lane takes: one float32, or
// two bfloat16 that follow each other along the depth of the product (`Float32`, `Bfloat16Pairs`).
// Absent keys are zeros, in keys and values: nothing that is not in a panel can touch a result, not even as NaN.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <array>
#include <type_traits>
#include <utility>

#include "vectors.h"

namespace sparse_compile {

constexpr int PANEL = LANES;
constexpr int CHUNK = 2 * LANES;

// Biases of a panel by the number of its keys: 0 where it has one, -inf where it has none.
constexpr auto PRESENT = [] {
  std::array<std::array<float, PANEL>, PANEL + 1> biases{};
  for (int count = 0; count <= PANEL; ++count)
    for (int n = count; n < PANEL; ++n) biases[count][n] = -INF;
  return biases;
}();

struct Float32 {
  using Unit = float;
  static constexpr int PER_UNIT = 1;

  static inline Vector multiply_add(Vector sum, Unit a, const Unit* b) { return sum + splat(a) * load(b); }

  // Weights of LANES keys, in the place of the scores they were made of.
  static inline void store_weights(Unit* row, int key, Vector weights) { store(row + key, weights); }

  template <typename T>
  static inline void copy_row(Unit* __restrict to, const T* __restrict from, int64_t size) {
    for (int64_t i = 0; i < size; ++i) to[i] = static_cast<float>(from[i]);
  }

  // A value that is not finite becomes NaN, whatever its weight (docs/svg2.md, section 9).
  template <typename T>
  static inline void copy_values(Unit* __restrict to, const T* __restrict from, int channels) {
    for (int i = 0; i < channels; ++i) {
      const float x = static_cast<float>(from[i]);
      to[i] = x + (x - x);
    }
  }
};

struct Bfloat16Pairs {
  using Unit = uint32_t;
  static constexpr int PER_UNIT = 2;

  static inline Vector multiply_add(Vector sum, Unit a, const Unit* b) {
#if defined(__AVX512BF16__)
    return (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32((int)a), (__m512bh)_mm512_loadu_si512(b));
#else
    IntVector bits;
    std::memcpy(&bits, b, sizeof bits);
    const Unit first = a << 16, second = a & 0xffff0000u;
    float low, high;
    std::memcpy(&low, &first, 4);
    std::memcpy(&high, &second, 4);
    return sum + splat(low) * (Vector)(bits << 16) + splat(high) * (Vector)(bits & static_cast<int32_t>(0xffff0000));
#endif
  }

  static inline void store_weights(Unit* row, int key, Vector weights) {
    uint16_t* to = reinterpret_cast<uint16_t*>(row) + key;
#if defined(__AVX512BF16__)
    const __m256bh rounded = _mm512_cvtneps_pbh((__m512)weights);
    std::memcpy(to, &rounded, sizeof rounded);
#else
    for (int lane = 0; lane < LANES; ++lane) {
      const uint16_t bits = c10::BFloat16(weights[lane]).x;
      std::memcpy(to + lane, &bits, 2);
    }
#endif
  }

  template <typename T>
  static inline void copy_row(Unit* __restrict to, const T* __restrict from, int64_t size) {
    if constexpr (std::is_same_v<T, c10::BFloat16>) {
      std::memcpy(to, from, size * sizeof(T));
    } else {
      for (int64_t i = 0; i < size; ++i) {
        const uint16_t bits = c10::BFloat16(static_cast<float>(from[i])).x;
        std::memcpy(reinterpret_cast<char*>(to) + 2 * i, &bits, 2);
      }
    }
  }

  // Two keys beside each other, channel by channel.
  template <typename T>
  static inline void copy_values(Unit* __restrict to, const T* __restrict first, const T* __restrict second,
                                 int channels) {
    for (int i = 0; i < channels; ++i) to[i] = bits_of(first[i]) | bits_of(second[i]) << 16;
  }

 private:
  template <typename T>
  static inline uint32_t bits_of(T x) {
    uint32_t bits;
    if constexpr (std::is_same_v<T, c10::BFloat16>) bits = x.x;
    else bits = c10::BFloat16(static_cast<float>(x)).x;
    return bits | ((bits & 0x7f80) == 0x7f80 ? 0x40 : 0);  // infinity becomes NaN, NaN stays
  }
};

// What the bfloat16 of this instruction set are multiplied as.
#if defined(__AVX512BF16__) || defined(SPARSE_COMPILE_EMULATED_TILES)
using Bfloat16 = Bfloat16Pairs;
#else
using Bfloat16 = Float32;
#endif

// Sizes of packed operands for heads of `size` channels, in units.
template <class M>
struct Packed {
  static constexpr int PANEL_DEPTH = PANEL / M::PER_UNIT;  // units along the keys of a panel

  explicit Packed(int64_t key_size, int64_t value_size)
      : depth((key_size + PANEL - 1) / PANEL * PANEL / M::PER_UNIT),
        chunks((value_size + CHUNK - 1) / CHUNK),
        keys(depth * PANEL),
        values(chunks * PANEL_DEPTH * CHUNK) {}

  int64_t depth;   // of a query or a key, padded with zeros
  int64_t chunks;  // of the channels of a value
  int64_t keys;    // of the keys of one panel
  int64_t values;  // of the values of one panel
};

// Exchange the rows and columns of LANES x LANES units of 32 bits, `from` with rows `stride` apart.
template <typename Unit>
inline void transpose(Unit* to, const Unit* from, int64_t stride) {
  IntVector rows[LANES];
  for (int i = 0; i < LANES; ++i) std::memcpy(&rows[i], from + i * stride, sizeof rows[i]);
  const auto swap_halves = [&]<int DISTANCE, int... LANE>(std::integral_constant<int, DISTANCE>,
                                                          std::integer_sequence<int, LANE...>) {
    for (int i = 0; i < LANES; ++i) {
      if (i & DISTANCE) continue;
      const IntVector first = rows[i], second = rows[i + DISTANCE];
      rows[i] = __builtin_shufflevector(first, second, (LANE & DISTANCE ? LANES + LANE - DISTANCE : LANE)...);
      rows[i + DISTANCE] =
          __builtin_shufflevector(first, second, (LANE & DISTANCE ? LANES + LANE : LANE + DISTANCE)...);
    }
  };
  constexpr std::make_integer_sequence<int, LANES> lanes{};
  if constexpr (LANES == 16) swap_halves(std::integral_constant<int, 8>{}, lanes);
  swap_halves(std::integral_constant<int, 4>{}, lanes);
  swap_halves(std::integral_constant<int, 2>{}, lanes);
  swap_halves(std::integral_constant<int, 1>{}, lanes);
  for (int i = 0; i < LANES; ++i) std::memcpy(to + i * LANES, &rows[i], sizeof rows[i]);
}

// Pack up to PANEL keys: rows[0..count) of `size` components each. `scratch` holds PANEL * depth units.
template <class M, typename T>
void pack_keys(typename M::Unit* to, const T* const* rows, int count, int64_t size, const Packed<M>& packed,
               typename M::Unit* scratch) {
  std::fill_n(scratch, PANEL * packed.depth, typename M::Unit(0));
  for (int n = 0; n < count; ++n) M::copy_row(scratch + n * packed.depth, rows[n], size);
  int64_t done = 0;
  for (; done + LANES <= packed.depth; done += LANES) transpose(to + done * PANEL, scratch + done, packed.depth);
  for (; done < packed.depth; ++done)
    for (int n = 0; n < PANEL; ++n) to[done * PANEL + n] = scratch[n * packed.depth + done];
}

// Pack up to PANEL values: rows[0..count) of `size` channels each.
template <class M, typename T>
void pack_values(typename M::Unit* to, const T* const* rows, int count, int64_t size, const Packed<M>& packed) {
  const auto absent = typename M::Unit(0);
  for (int64_t chunk = 0; chunk < packed.chunks; ++chunk) {
    const int64_t first = chunk * CHUNK;
    const int channels = static_cast<int>(std::min<int64_t>(CHUNK, size - first));
    for (int n = 0; n < PANEL; n += M::PER_UNIT, to += CHUNK) {
      if (channels < CHUNK || n >= count) std::fill_n(to, CHUNK, absent);
      if (n >= count) continue;
      if constexpr (M::PER_UNIT == 1) {
        M::copy_values(to, rows[n] + first, channels);
      } else {
        static constexpr T nothing[CHUNK] = {};
        M::copy_values(to, rows[n] + first, n + 1 < count ? rows[n + 1] + first : nothing, channels);
      }
    }
  }
}

}  // namespace sparse_compile
