// Attention over a head: products in bfloat16, sums and exponentials in float32.

#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "registers.h"

namespace lamella {

constexpr int QUERIES = 8;  // rows at a time

// The sum and the products of two pairs of bfloat16; see `plus_bytes`.
inline __m512 plus_pairs(__m512 sum, __m512i a, __m512i b) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  return sum;
}

// SOME rows of pairs by 16 NZ columns of pairs, which lie `width` apart.
template <int SOME, int NZ>
inline void multiply_pairs(const uint16_t* rows, int64_t stride, const uint32_t* columns,
                           int64_t width, int64_t pairs, __m512 (&sums)[SOME][NZ]) {
  UNROLL for (int r = 0; r < SOME; ++r) {
    UNROLL for (int z = 0; z < NZ; ++z) sums[r][z] = _mm512_setzero_ps();
  }
  for (int64_t k = 0; k < pairs; ++k) {
    __m512i b[NZ];
    UNROLL for (int z = 0; z < NZ; ++z) {
      b[z] = _mm512_loadu_si512(columns + k * width + z * LANES);
    }
    UNROLL for (int r = 0; r < SOME; ++r) {
      int32_t pair;
      std::memcpy(&pair, rows + r * stride + 2 * k, 4);
      const __m512i a = _mm512_set1_epi32(pair);
      UNROLL for (int z = 0; z < NZ; ++z) sums[r][z] = plus_pairs(sums[r][z], a, b[z]);
    }
  }
}

// Exponentials of a row of scores in bfloat16; one over their sum, or 0 where no key counts.
inline float exponentials(float* scores, int64_t count, const float* penalty, float factor,
                          uint16_t* out) {
  __m512 most = _mm512_set1_ps(-INFINITE);
  for (int64_t j = 0; j < count; j += LANES) {
    __m512 x = _mm512_loadu_ps(scores + j);
    if (penalty != nullptr) {
      x = _mm512_add_ps(x, _mm512_loadu_ps(penalty + j));
      _mm512_storeu_ps(scores + j, x);
    }
    most = _mm512_max_ps(most, x);
  }
  const float top = _mm512_reduce_max_ps(most);
  if (top == -INFINITE) {
    std::memset(out, 0, count * sizeof(uint16_t));
    return 0;
  }
  const __m512 slope = _mm512_set1_ps(factor), shift = _mm512_set1_ps(-top * factor);
  __m512 sum = _mm512_setzero_ps();
  for (int64_t j = 0; j < count; j += LANES) {
    const __m512 e = power_of_two(_mm512_fmadd_ps(_mm512_loadu_ps(scores + j), slope, shift));
    sum = _mm512_add_ps(sum, e);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + j), (__m256i)_mm512_cvtneps_pbh(e));
  }
  return 1 / _mm512_reduce_add_ps(sum);
}

// Keys and values of one head as products read them, and room for some rows of scores.
class Head {
 public:
  // `count` keys, of `size` entries, which is a multiple of 16.
  Head(int64_t count, int64_t size)
      : count_(count), filled_(up(count, LANES)), size_(size), keys_(filled_ * size / 2),
        values_(filled_ * size / 2), pair_(2 * size), queries_(QUERIES * size),
        scores_(QUERIES * filled_), weights_(QUERIES * filled_) {}

  void read_keys(const at::BFloat16* keys, int64_t stride) {
    for (int64_t j = 0; j < count_; ++j) {
      for (int64_t c = 0; c < size_ / 2; ++c) {
        std::memcpy(&keys_[c * filled_ + j], keys + j * stride + 2 * c, 4);
      }
    }
  }

  void read_values(const at::BFloat16* values, int64_t stride) {
    for (int64_t j = 0; j < count_; j += 2) {
      std::memcpy(pair_.data(), values + j * stride, 2 * size_);
      if (j + 1 < count_) {
        std::memcpy(pair_.data() + size_, values + (j + 1) * stride, 2 * size_);
      } else {
        std::fill(pair_.begin() + size_, pair_.end(), 0);
      }
      for (int64_t d = 0; d < size_; ++d) {
        const uint32_t next = pair_[size_ + d];
        values_[j / 2 * size_ + d] = pair_[d] | next << 16;
      }
    }
  }

  // Up to 8 rows of queries; `finish(row, place, results)` takes 16 results at a time.
  template <typename Finish>
  void attend(const at::BFloat16* queries, int64_t stride, int64_t rows, const float* penalty,
              float factor, const Finish& finish) {
    for (int64_t r = 0; r < rows; ++r) {
      std::memcpy(queries_.data() + r * size_, queries + r * stride, 2 * size_);
    }
    int64_t j = 0;
    for (; j + 4 * LANES <= filled_; j += 4 * LANES) score<4>(j);
    for (; j < filled_; j += LANES) score<1>(j);
    float inverse[QUERIES];
    for (int r = 0; r < QUERIES; ++r) {
      inverse[r] = exponentials(scores_.data() + r * filled_, filled_, penalty, factor,
                                weights_.data() + r * filled_);
    }
    int64_t d = 0;
    for (; d + 2 * LANES <= size_; d += 2 * LANES) weigh<2>(d, rows, inverse, finish);
    for (; d < size_; d += LANES) weigh<1>(d, rows, inverse, finish);
  }

 private:
  template <int NZ>
  void score(int64_t first) {
    constexpr int HALF = QUERIES / 2;
    for (int top = 0; top < QUERIES; top += HALF) {
      __m512 sums[HALF][NZ];
      multiply_pairs<HALF, NZ>(queries_.data() + top * size_, size_, keys_.data() + first,
                               filled_, size_ / 2, sums);
      UNROLL for (int r = 0; r < HALF; ++r) {
        float* row = scores_.data() + (top + r) * filled_ + first;
        UNROLL for (int z = 0; z < NZ; ++z) _mm512_storeu_ps(row + z * LANES, sums[r][z]);
      }
    }
  }

  template <int NZ, typename Finish>
  void weigh(int64_t place, int64_t rows, const float* inverse, const Finish& finish) {
    __m512 sums[QUERIES][NZ];
    multiply_pairs<QUERIES, NZ>(weights_.data(), filled_, values_.data() + place, size_,
                                filled_ / 2, sums);
    UNROLL for (int r = 0; r < QUERIES; ++r) {
      const __m512 factor = _mm512_set1_ps(inverse[r]);
      UNROLL for (int z = 0; z < NZ; ++z) {
        if (r < rows) finish(r, place + z * LANES, _mm512_mul_ps(sums[r][z], factor));
      }
    }
  }

  int64_t count_, filled_, size_;
  std::vector<uint32_t> keys_, values_;
  std::vector<uint16_t> pair_, queries_;
  std::vector<float> scores_;
  std::vector<uint16_t> weights_;
};

}  // namespace lamella
