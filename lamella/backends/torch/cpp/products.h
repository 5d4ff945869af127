// Products of 8-bit integers, and what is done to a row of results while it is in the cache.

#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>

#include "registers.h"

namespace lamella {

constexpr int PANEL = 4;             // registers of outputs at a time
constexpr int WIDE = PANEL * LANES;  // outputs at a time
constexpr int ROWS = 6;              // rows at a time, so that 24 sums are in registers
constexpr int BLOCK = 16 * ROWS;     // rows that a panel of the weight is read for
constexpr int FEW = 2 * BLOCK;       // rows that are fewer bytes than the weight

// A weight [outputs, inputs] for results ``slope * (start + codes @ panels) + bias``.
struct Weight {
  const int8_t* panels;  // [outputs / 64][inputs / 4][64][4], filled up with zeros
  const int32_t* start;  // what the zero of the codes of rows takes away
  const float* slopes;
  const float* bias;
  int64_t inputs, outputs;
};

// The sum and the products of four unsigned with four signed bytes. As an intrinsic, compilers
// copy sums around it, and read b again for each row.
inline __m512i plus_bytes(__m512i sum, __m512i a, __m512i b) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  return sum;
}

// SOME rows of codes by one panel: sums [SOME][64].
template <int SOME>
[[gnu::noinline]] void tile(const uint8_t* rows, int64_t inputs, const int8_t* panel,
                            const int32_t* start, __m512i* out) {
  __m512i sums[SOME][PANEL];
  UNROLL for (int z = 0; z < PANEL; ++z) {
    const __m512i first = _mm512_loadu_si512(start + z * LANES);
    UNROLL for (int r = 0; r < SOME; ++r) sums[r][z] = first;
  }
  for (int64_t k = 0; k < inputs; k += 4, panel += 4 * WIDE) {
    __m512i b[PANEL];
    UNROLL for (int z = 0; z < PANEL; ++z) b[z] = _mm512_loadu_si512(panel + z * 4 * LANES);
    UNROLL for (int r = 0; r < SOME; ++r) {
      int32_t four;
      std::memcpy(&four, rows + r * inputs + k, 4);
      const __m512i a = _mm512_set1_epi32(four);
      UNROLL for (int z = 0; z < PANEL; ++z) sums[r][z] = plus_bytes(sums[r][z], a, b[z]);
    }
  }
  UNROLL for (int r = 0; r < SOME; ++r) {
    UNROLL for (int z = 0; z < PANEL; ++z) out[r * PANEL + z] = sums[r][z];
  }
}

// Rows and panels of a product.
struct Part {
  int64_t row, row_end, panel, panel_end;
};

// Some rows of codes by some panels; `finish(row, output, results)` takes 16 results at a time.
template <typename Finish>
inline void multiply(const uint8_t* codes, const Part& part, const Weight& weight,
                     const Finish& finish) {
  static constexpr decltype(&tile<1>) TILES[] = {tile<1>, tile<2>, tile<3>,
                                                 tile<4>, tile<5>, tile<6>};
  __m512i sums[ROWS * PANEL];
  for (int64_t first = part.panel * WIDE; first < part.panel_end * WIDE; first += WIDE) {
    __m512 slopes[PANEL], bias[PANEL];
    for (int z = 0; z < PANEL; ++z) {
      slopes[z] = _mm512_loadu_ps(weight.slopes + first + z * LANES);
      bias[z] = _mm512_loadu_ps(weight.bias + first + z * LANES);
    }
    for (int64_t top = part.row; top < part.row_end; top += ROWS) {
      const int64_t some = std::min<int64_t>(ROWS, part.row_end - top);
      TILES[some - 1](codes + top * weight.inputs, weight.inputs,
                      weight.panels + first * weight.inputs, weight.start + first, sums);
      for (int64_t r = 0; r < some; ++r) {
        for (int z = 0; z < PANEL; ++z) {
          const __m512 x = _mm512_cvtepi32_ps(sums[r * PANEL + z]);
          finish(top + r, first + z * LANES, _mm512_fmadd_ps(x, slopes[z], bias[z]));
        }
      }
    }
  }
}

// `work(begin, end)` on blocks of rows, by all threads.
template <typename Work>
void over_rows(int64_t rows, const Work& work) {
  const int64_t threads = at::get_num_threads();
  // As many blocks for each thread, and none that is larger than the cache.
  const int64_t share = (rows + threads - 1) / threads;
  const int64_t each = std::max<int64_t>(1, (share + BLOCK - 1) / BLOCK);
  const int64_t block = std::max<int64_t>(ROWS, up((share + each - 1) / each, ROWS));
  at::parallel_for(0, (rows + block - 1) / block, 1, [&](int64_t begin, int64_t end) {
    for (int64_t one = begin; one < end; ++one) {
      work(one * block, std::min(rows, (one + 1) * block));
    }
  });
}

inline int64_t panels_of(const Weight& weight) { return up(weight.outputs, WIDE) / WIDE; }

// Few rows are read by every thread and the weight once, many rows the other way round.
inline bool are_few(int64_t rows, const Weight& weight) {
  return rows <= FEW && panels_of(weight) >= at::get_num_threads();
}

// `work(part)` on all of a product, by all threads.
template <typename Work>
void over_parts(int64_t rows, const Weight& weight, const Work& work) {
  const int64_t panels = panels_of(weight);
  if (are_few(rows, weight)) {
    at::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
      work(Part{0, rows, begin, end});
    });
  } else {
    over_rows(rows, [&](int64_t begin, int64_t end) { work(Part{begin, end, 0, panels}); });
  }
}

// The codes of (x - mean) / sqrt(variance + epsilon) * gain + shift, which takes the place of the
// row unless that is kept.
class Norm {
 public:
  Norm(int64_t size, const float* gain, const float* shift, double epsilon, const Grid& grid,
       bool keeps_row)
      : size_(size), gain_(gain), shift_(shift), epsilon_(static_cast<float>(epsilon)),
        grid_(grid), keeps_row_(keeps_row) {}

  void apply(float* row, uint8_t* codes) const {
    const __m512 mean = _mm512_set1_ps(mean_of(row));
    const __m512 factor = _mm512_set1_ps(1 / std::sqrt(variance_of(row, mean) + epsilon_));
    for (int64_t n = 0; n < size_; n += LANES) {
      const __mmask16 mask = mask_of(size_ - n);
      const __m512 x = _mm512_sub_ps(_mm512_maskz_loadu_ps(mask, row + n), mean);
      const __m512 gain = _mm512_maskz_loadu_ps(mask, gain_ + n);
      const __m512 shift = _mm512_maskz_loadu_ps(mask, shift_ + n);
      const __m512 y = _mm512_fmadd_ps(_mm512_mul_ps(x, factor), gain, shift);
      if (!keeps_row_) store(row + n, mask, y);
      store(codes + n, mask, grid_.codes(y));
    }
  }

 private:
  float mean_of(const float* row) const {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t n = 0; n < size_; n += LANES) {
      sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(mask_of(size_ - n), row + n));
    }
    return _mm512_reduce_add_ps(sum) / static_cast<float>(size_);
  }

  float variance_of(const float* row, __m512 mean) const {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t n = 0; n < size_; n += LANES) {
      const __mmask16 mask = mask_of(size_ - n);
      const __m512 x = _mm512_maskz_sub_ps(mask, _mm512_maskz_loadu_ps(mask, row + n), mean);
      sum = _mm512_fmadd_ps(x, x, sum);
    }
    return _mm512_reduce_add_ps(sum) / static_cast<float>(size_);
  }

  int64_t size_;
  const float *gain_, *shift_;
  float epsilon_;
  Grid grid_;
  bool keeps_row_;
};

}  // namespace lamella
