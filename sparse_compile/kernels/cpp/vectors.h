// Vectors of float32 as wide as a register of the target, and what attention computes on them.
//
// GCC's vector extension in place of intrinsics, so that one source serves every instruction set; an intrinsic stands
// only where the compiler has no way to find the instruction.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace sparse_compile {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#else
constexpr int LANES = 8;  // without AVX2 the compiler makes two registers of one vector
#endif

typedef float Vector __attribute__((vector_size(LANES * 4)));
typedef int32_t IntVector __attribute__((vector_size(LANES * 4)));

constexpr float INF = std::numeric_limits<float>::infinity();
constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;

inline Vector splat(float x) { return x - Vector{}; }

inline Vector load(const float* from) {
  Vector v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

inline void store(float* to, Vector v) { std::memcpy(to, &v, sizeof v); }

// Where `a` is NaN the result is NaN or `b`; where `b` is NaN it is NaN.
inline Vector maximum(Vector a, Vector b) { return a > b ? a : b; }

// 2^x with a relative error below 2e-7, for -126 <= x < 127; 0 for x <= -127, NaN for NaN.
inline Vector exp2_below_127(Vector x) {
  const auto power_of_fraction = [](Vector f) {  // minimax polynomial of 2^f on [0, 1]
    Vector p = splat(0.0018775766948238015f);
    p = p * f + splat(0.00898933969438076f);
    p = p * f + splat(0.05582631751894951f);
    p = p * f + splat(0.24015361070632935f);
    p = p * f + splat(0.6931530833244324f);
    return p * f + splat(0.9999999403953552f);
  };
#if defined(__AVX512DQ__)
  constexpr int FLOOR = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
  const Vector fraction = (Vector)_mm512_reduce_ps((__m512)x, FLOOR);
  const __mmask16 counts = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-127.f), _CMP_NLE_UQ);
  return (Vector)_mm512_maskz_scalef_ps(counts, (__m512)power_of_fraction(fraction), (__m512)x);
#else
  x = maximum(splat(-127.f), x);
  const Vector to_integer = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vector whole = (x - splat(0.5f) + to_integer) - to_integer;
  const IntVector exponent = (__builtin_convertvector(whole, IntVector) + 127) << 23;  // of -127 and -128: 0, or below
  const Vector power = power_of_fraction(x - whole) * (Vector)exponent;
  return x > splat(-127.f) ? power : x - x;  // NaN stays, anything finite becomes 0
#endif
}

// Lane i of the result is lane (i + DISTANCE) % LANES.
template <int DISTANCE>
inline Vector rotated(Vector v) {
  return [v]<int... LANE>(std::integer_sequence<int, LANE...>) {
    return __builtin_shufflevector(v, v, (LANE + DISTANCE) % LANES...);
  }(std::make_integer_sequence<int, LANES>{});
}

inline float largest(Vector v) {
  if constexpr (LANES == 16) v = maximum(v, rotated<8>(v));
  v = maximum(v, rotated<4>(v));
  v = maximum(v, rotated<2>(v));
  return maximum(v, rotated<1>(v))[0];
}

inline float sum(Vector v) {
  if constexpr (LANES == 16) v += rotated<8>(v);
  v += rotated<4>(v);
  v += rotated<2>(v);
  return (v + rotated<1>(v))[0];
}

}  // namespace sparse_compile
