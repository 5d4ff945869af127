// Functions of 16 float32 numbers at a time, and codes of 8 bits.

#pragma once

#include <ATen/ATen.h>
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <limits>

#define UNROLL _Pragma("GCC unroll 16")

namespace lamella {

constexpr int LANES = 16;
constexpr float INFINITE = std::numeric_limits<float>::infinity();

inline int64_t up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// Which of 16 places there are, where `left` are left.
inline __mmask16 mask_of(int64_t left) {
  return left >= LANES ? 0xFFFF : left <= 0 ? 0 : static_cast<__mmask16>((1u << left) - 1);
}

template <int DEGREE>
inline __m512 polynomial(__m512 x, const float (&c)[DEGREE + 1]) {
  __m512 sum = _mm512_set1_ps(c[DEGREE]);
  UNROLL for (int i = DEGREE - 1; i >= 0; --i) {
    sum = _mm512_fmadd_ps(sum, x, _mm512_set1_ps(c[i]));
  }
  return sum;
}

// 2^x, to 4e-6 of it; below 2^-126 it stays there.
inline __m512 power_of_two(__m512 x) {
  static constexpr float C[] = {1.0f, 0.69314706f, 0.24022652f, 0.055503f, 0.0096779f};
  // Added to a number, it leaves the nearest integer in the last bits.
  const __m512 magic = _mm512_set1_ps(12582912.0f);
  const __m512 near = _mm512_max_ps(x, _mm512_set1_ps(-126.0f));
  const __m512 shifted = _mm512_add_ps(near, magic);
  const __m512 rest = _mm512_sub_ps(near, _mm512_sub_ps(shifted, magic));
  const __m512i exponent = _mm512_slli_epi32(_mm512_castps_si512(shifted), 23);
  const __m512i bits = _mm512_castps_si512(polynomial<4>(rest, C));
  return _mm512_castsi512_ps(_mm512_add_epi32(bits, exponent));
}

// x (1 + erf(x / sqrt(2))) / 2, to 1e-5 of x: a minimax polynomial of erf, whose end is 4.5.
inline __m512 gelu(__m512 x) {
  static constexpr float C[] = {0.31381208f,  -0.15437177f, 0.10927498f,  -0.08047395f,
                                0.05771531f,  -0.03696795f, 0.01930643f,  -0.01214038f,
                                0.00992542f,  -0.00386107f};
  constexpr float END = 4.5f;
  const __m512 less = _mm512_min_ps(x, _mm512_set1_ps(END));
  const __m512 near = _mm512_max_ps(less, _mm512_set1_ps(-END));
  const __m512 square = _mm512_mul_ps(near, near);
  const __m512 place =
      _mm512_fmsub_ps(square, _mm512_set1_ps(2 / (END * END)), _mm512_set1_ps(1.0f));
  const __m512 half = _mm512_mul_ps(x, _mm512_set1_ps(0.5f));
  return _mm512_fmadd_ps(half, _mm512_mul_ps(near, polynomial<9>(place, C)), half);
}

// x / (1 + exp(-2 u)) with u = sqrt(2 / pi) (x + 0.044715 x^3).
inline __m512 gelu_tanh(__m512 x) {
  constexpr float SLOPE = -2 * 0.7978845608f * 1.44269504f;
  const __m512 square = _mm512_mul_ps(x, x);
  const __m512 more =
      _mm512_fmadd_ps(square, _mm512_set1_ps(0.044715f), _mm512_set1_ps(1.0f));
  const __m512 power = _mm512_mul_ps(_mm512_mul_ps(x, more), _mm512_set1_ps(SLOPE));
  const __m512 most = _mm512_min_ps(power, _mm512_set1_ps(126.0f));
  return _mm512_div_ps(x, _mm512_add_ps(power_of_two(most), _mm512_set1_ps(1.0f)));
}

// clip(round(x / step) + zero, 0, 255)
class Grid {
 public:
  Grid(double step, int64_t zero)
      : inverse_(_mm512_set1_ps(static_cast<float>(1 / step))),
        zero_(_mm512_set1_epi32(static_cast<int>(zero))) {}

  __m128i codes(__m512 x) const {
    // Larger numbers have no int32.
    const __m512 steps = _mm512_min_ps(_mm512_mul_ps(x, inverse_), _mm512_set1_ps(512.0f));
    const __m512i code = _mm512_add_epi32(_mm512_cvtps_epi32(steps), zero_);
    return _mm512_cvtusepi32_epi8(_mm512_max_epi32(code, _mm512_setzero_si512()));
  }

 private:
  __m512 inverse_;
  __m512i zero_;
};

inline void store(float* to, __mmask16 mask, __m512 x) { _mm512_mask_storeu_ps(to, mask, x); }

inline void store(at::BFloat16* to, __mmask16 mask, __m512 x) {
  _mm256_mask_storeu_epi16(to, mask, (__m256i)_mm512_cvtneps_pbh(x));
}

inline void store(uint8_t* to, __mmask16 mask, __m128i codes) {
  _mm_mask_storeu_epi8(to, mask, codes);
}

}  // namespace lamella
