// Layers of 8-bit integers that hand over codes, and attention between them, as operators.
//
// For processors with AVX-512, VNNI and BF16. `lamella.backends.torch.native` compiles this file
// and says what the operators compute.

#include <ATen/ATen.h>
#include <torch/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "attention.h"
#include "products.h"

namespace lamella {
namespace {

enum Kind : int64_t { FLOATS, BFLOATS, CODES };
enum Activation : int64_t { NONE, GELU, GELU_TANH, RELU };

constexpr int64_t CHUNK = 64;   // queries of one piece of work
constexpr int64_t SEVERAL = 4;  // sequences for each thread, so that all have as many
constexpr double LOG2_E = 1.4426950408889634;

template <int ACTIVATION>
inline __m512 activated(__m512 x) {
  if constexpr (ACTIVATION == GELU) return gelu(x);
  if constexpr (ACTIVATION == GELU_TANH) return gelu_tanh(x);
  if constexpr (ACTIVATION == RELU) return _mm512_max_ps(x, _mm512_setzero_ps());
  return x;
}

Weight weight_of(const at::Tensor& panels, const at::Tensor& start, const at::Tensor& slopes,
                 const at::Tensor& bias, int64_t outputs) {
  TORCH_CHECK(panels.dim() == 4 && panels.size(0) == up(outputs, WIDE) / WIDE,
              "panels of another weight");
  for (const at::Tensor& one : {start, slopes, bias}) {
    TORCH_CHECK(one.numel() == panels.size(0) * WIDE, "vectors are not as long as panels");
  }
  return {panels.const_data_ptr<int8_t>(),  start.const_data_ptr<int32_t>(),
          slopes.const_data_ptr<float>(),   bias.const_data_ptr<float>(),
          panels.size(1) * 4,               outputs};
}

std::vector<int64_t> shape_of(const at::Tensor& codes, const Weight& weight) {
  TORCH_CHECK(codes.size(-1) == weight.inputs, "codes have ", codes.size(-1),
              " entries, the weight ", weight.inputs);
  std::vector<int64_t> shape = codes.sizes().vec();
  shape.back() = weight.outputs;
  return shape;
}

// Codes [out, in] in panels.
at::Tensor pack(const at::Tensor& given) {
  TORCH_CHECK(given.dim() == 2 && given.size(1) % 4 == 0, "rows must be whole fours");
  const at::Tensor codes = given.contiguous();
  const int64_t outputs = codes.size(0), inputs = codes.size(1);
  const int64_t panels = up(outputs, WIDE) / WIDE;
  at::Tensor out = at::zeros({panels, inputs / 4, WIDE, 4}, codes.options());
  const int8_t* from = codes.const_data_ptr<int8_t>();
  int8_t* to = out.mutable_data_ptr<int8_t>();
  for (int64_t n = 0; n < outputs; ++n) {
    int8_t* panel = to + n / WIDE * inputs * WIDE + n % WIDE * 4;
    for (int64_t k = 0; k < inputs; k += 4) {
      std::memcpy(panel + k * WIDE, from + n * inputs + k, 4);
    }
  }
  return out;
}

template <int ACTIVATION, typename T>
void write(const uint8_t* codes, int64_t rows, const Weight& weight, const Grid& grid, T* out) {
  const auto finish = [&](int64_t row, int64_t n, __m512 x) {
    T* to = out + row * weight.outputs + n;
    const __mmask16 mask = mask_of(weight.outputs - n);
    const __m512 y = activated<ACTIVATION>(x);
    if constexpr (std::is_same_v<T, uint8_t>) {
      store(to, mask, grid.codes(y));
    } else {
      store(to, mask, y);
    }
  };
  over_parts(rows, weight, [&](const Part& part) { multiply(codes, part, weight, finish); });
}

template <int ACTIVATION>
void write_kind(int64_t kind, const uint8_t* codes, int64_t rows, const Weight& weight,
                const Grid& grid, at::Tensor& out) {
  switch (kind) {
    case FLOATS:
      return write<ACTIVATION>(codes, rows, weight, grid, out.mutable_data_ptr<float>());
    case BFLOATS:
      return write<ACTIVATION>(codes, rows, weight, grid, out.mutable_data_ptr<at::BFloat16>());
    default:
      return write<ACTIVATION>(codes, rows, weight, grid, out.mutable_data_ptr<uint8_t>());
  }
}

at::Tensor product(const at::Tensor& input, const at::Tensor& panels, const at::Tensor& start,
                   const at::Tensor& slopes, const at::Tensor& bias, int64_t outputs,
                   int64_t kind, int64_t activation, double step, int64_t zero) {
  static const at::ScalarType DTYPES[] = {at::kFloat, at::kBFloat16, at::kByte};
  TORCH_CHECK(kind >= FLOATS && kind <= CODES, "unknown kind of results");
  const at::Tensor codes = input.contiguous();
  const Weight weight = weight_of(panels, start, slopes, bias, outputs);
  at::Tensor out = at::empty(shape_of(codes, weight), codes.options().dtype(DTYPES[kind]));
  const int64_t rows = out.numel() / outputs;
  const uint8_t* from = codes.const_data_ptr<uint8_t>();
  const Grid grid(step, zero);
  switch (activation) {
    case GELU:
      write_kind<GELU>(kind, from, rows, weight, grid, out);
      break;
    case GELU_TANH:
      write_kind<GELU_TANH>(kind, from, rows, weight, grid, out);
      break;
    case RELU:
      write_kind<RELU>(kind, from, rows, weight, grid, out);
      break;
    default:
      write_kind<NONE>(kind, from, rows, weight, grid, out);
  }
  return out;
}

std::tuple<at::Tensor, at::Tensor> product_norm(
    const at::Tensor& input, const at::Tensor& panels, const at::Tensor& start,
    const at::Tensor& slopes, const at::Tensor& bias, const at::Tensor& other,
    const at::Tensor& gain, const at::Tensor& shift, double epsilon, double step, int64_t zero,
    bool keeps_sum) {
  const at::Tensor codes = input.contiguous();
  const Weight weight = weight_of(panels, start, slopes, bias, gain.numel());
  const std::vector<int64_t> shape = shape_of(codes, weight);
  const at::Tensor added = other.to(at::kFloat).expand(shape).contiguous();
  const at::Tensor gains = gain.to(at::kFloat).contiguous();
  const at::Tensor shifts = shift.to(at::kFloat).contiguous();
  at::Tensor out = at::empty(shape, added.options()), rounded = at::empty(shape, codes.options());
  const Norm norm(weight.outputs, gains.const_data_ptr<float>(), shifts.const_data_ptr<float>(),
                  epsilon, Grid(step, zero), keeps_sum);
  const uint8_t* from = codes.const_data_ptr<uint8_t>();
  const float* plus = added.const_data_ptr<float>();
  float* to = out.mutable_data_ptr<float>();
  uint8_t* to_codes = rounded.mutable_data_ptr<uint8_t>();
  const auto finish = [&](int64_t row, int64_t n, __m512 x) {
    const __mmask16 mask = mask_of(weight.outputs - n);
    const int64_t place = row * weight.outputs + n;
    // The same row of the next panel.
    __builtin_prefetch(plus + place + WIDE, 0, 2);
    __builtin_prefetch(to + place + WIDE, 1, 2);
    store(to + place, mask, _mm512_add_ps(x, _mm512_maskz_loadu_ps(mask, plus + place)));
  };
  const auto apply = [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      norm.apply(to + row * weight.outputs, to_codes + row * weight.outputs);
    }
  };
  const int64_t rows = out.numel() / weight.outputs;
  // Asked once: the threads that are counted may be others inside of a part.
  const bool split = are_few(rows, weight);
  over_parts(rows, weight, [&](const Part& part) {
    multiply(from, part, weight, finish);
    if (!split) apply(part.row, part.row_end);
  });
  // No part has whole rows.
  if (split) over_rows(rows, apply);
  return {out, rounded};
}

// 0 for keys that count and minus infinity for others, [1 or batch, keys filled up to 16].
at::Tensor penalties(const std::optional<at::Tensor>& mask, int64_t count) {
  const int64_t batch = mask ? mask->size(0) : 1, filled = up(count, LANES);
  const at::Tensor held = mask ? mask->contiguous() : at::Tensor();
  const bool* counts = mask ? held.const_data_ptr<bool>() : nullptr;
  at::Tensor out = at::empty({batch, filled}, at::kFloat);
  float* to = out.mutable_data_ptr<float>();
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t j = 0; j < filled; ++j) {
      const bool in = j < count && (counts == nullptr || counts[b * count + j]);
      to[b * filled + j] = in ? 0 : -INFINITE;
    }
  }
  return out;
}

at::Tensor in_pairs(const at::Tensor& given) {
  const at::Tensor narrow = given.to(at::kBFloat16);
  return narrow.stride(-1) == 1 ? narrow : narrow.contiguous();
}

struct Heads {
  const at::BFloat16* data;
  int64_t batch, head, row;

  explicit Heads(const at::Tensor& of)
      : data(of.const_data_ptr<at::BFloat16>()), batch(of.stride(0)), head(of.stride(1)),
        row(of.stride(2)) {}

  const at::BFloat16* at(int64_t b, int64_t h) const { return data + b * batch + h * head; }
};

// What keys count, and how results are rounded.
class Rounding {
 public:
  Rounding(const std::optional<at::Tensor>& mask, int64_t count, double scale, const Grid& grid)
      : factor(static_cast<float>(scale * LOG2_E)), grid(grid) {
    if (mask || count % LANES != 0) penalties_ = penalties(mask, count);
    if (penalties_.defined()) data_ = penalties_.const_data_ptr<float>();
    if (penalties_.defined() && penalties_.size(0) > 1) apart_ = penalties_.size(1);
  }

  const float* penalty(int64_t b) const { return data_ == nullptr ? nullptr : data_ + b * apart_; }

  const float factor;
  const Grid grid;

 private:
  at::Tensor penalties_;
  const float* data_ = nullptr;
  int64_t apart_ = 0;
};

// Codes of some rows of a head, which lie `apart`.
void attend(Head& head, const at::BFloat16* queries, int64_t stride, int64_t rows,
            const float* penalty, const Rounding& rounding, uint8_t* to, int64_t apart) {
  for (int64_t i = 0; i < rows; i += QUERIES) {
    const auto finish = [&](int64_t r, int64_t d, __m512 x) {
      store(to + (i + r) * apart + d, 0xFFFF, rounding.grid.codes(x));
    };
    head.attend(queries + i * stride, stride, std::min<int64_t>(QUERIES, rows - i), penalty,
                rounding.factor, finish);
  }
}

at::Tensor attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                     const std::optional<at::Tensor>& mask, double scale, double step,
                     int64_t zero) {
  const at::Tensor q = in_pairs(query), k = in_pairs(key), v = in_pairs(value);
  const int64_t batch = q.size(0), heads = q.size(1), rows = q.size(2), size = q.size(3);
  const int64_t count = k.size(2), chunks = (rows + CHUNK - 1) / CHUNK;
  TORCH_CHECK(size % LANES == 0 && v.size(3) == size, "heads must be whole sixteens wide");
  at::Tensor out = at::empty({batch, rows, heads * size}, q.options().dtype(at::kByte));
  const Rounding rounding(mask, count, scale, Grid(step, zero));
  const Heads queries(q), keys(k), values(v);
  uint8_t* to = out.mutable_data_ptr<uint8_t>();
  at::parallel_for(0, batch * heads * chunks, 1, [&](int64_t begin, int64_t end) {
    Head head(count, size);
    int64_t last = -1;
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t b = piece / chunks / heads, h = piece / chunks % heads;
      if (piece / chunks != last) {
        head.read_keys(keys.at(b, h), keys.row);
        head.read_values(values.at(b, h), values.row);
        last = piece / chunks;
      }
      const int64_t first = piece % chunks * CHUNK;
      attend(head, queries.at(b, h) + first * queries.row, queries.row,
             std::min(rows - first, CHUNK), rounding.penalty(b), rounding,
             to + ((b * rows + first) * heads + h) * size, heads * size);
    }
  });
  return out;
}

// Attention whose queries, keys and values are parts of the outputs of one product.
at::Tensor product_attention(const at::Tensor& input, const at::Tensor& panels,
                             const at::Tensor& start, const at::Tensor& slopes,
                             const at::Tensor& bias, int64_t outputs, at::IntArrayRef shape,
                             at::IntArrayRef starts, int64_t heads, int64_t size,
                             const std::optional<at::Tensor>& mask, double scale, double step,
                             int64_t zero) {
  TORCH_CHECK(shape.size() == 2 && starts.size() == 3, "not batch and rows, or not three parts");
  const int64_t batch = shape[0], rows = shape[1], width = heads * size;
  const at::Tensor codes = input.reshape({batch, rows, input.size(-1)});
  if (batch < SEVERAL * at::get_num_threads()) {
    const at::Tensor joined =
        product(codes, panels, start, slopes, bias, outputs, BFLOATS, NONE, 1, 0);
    const auto part = [&](int64_t first) {
      return joined.narrow(2, first, width).view({batch, rows, heads, size}).transpose(1, 2);
    };
    return attention(part(starts[0]), part(starts[1]), part(starts[2]), mask, scale, step, zero);
  }
  TORCH_CHECK(size % LANES == 0, "heads must be whole sixteens wide");
  const Weight weight = weight_of(panels, start, slopes, bias, outputs);
  at::Tensor out = at::empty({batch, rows, width}, codes.options());
  const at::Tensor held = codes.contiguous();
  const uint8_t* from = held.const_data_ptr<uint8_t>();
  uint8_t* to = out.mutable_data_ptr<uint8_t>();
  const Rounding rounding(mask, rows, scale, Grid(step, zero));
  // The outputs of one sequence stay in the cache.
  at::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
    Head head(rows, size);
    std::vector<at::BFloat16> joined(rows * outputs);
    const auto finish = [&](int64_t row, int64_t n, __m512 x) {
      store(joined.data() + row * outputs + n, mask_of(outputs - n), x);
    };
    for (int64_t b = begin; b < end; ++b) {
      const Part all{0, rows, 0, panels_of(weight)};
      multiply(from + b * rows * weight.inputs, all, weight, finish);
      for (int64_t h = 0; h < heads; ++h) {
        const at::BFloat16* first = joined.data() + h * size;
        head.read_keys(first + starts[1], outputs);
        head.read_values(first + starts[2], outputs);
        attend(head, first + starts[0], outputs, rows, rounding.penalty(b), rounding,
               to + b * rows * width + h * size, width);
      }
    }
  });
  return out;
}

}  // namespace
}  // namespace lamella

TORCH_LIBRARY(lamella_native, m) {
  m.def("pack(Tensor codes) -> Tensor", lamella::pack);
  m.def(
      "product(Tensor codes, Tensor panels, Tensor start, Tensor slopes, Tensor bias, "
      "int outputs, int kind, int activation, float step, int zero) -> Tensor",
      lamella::product);
  m.def(
      "product_norm(Tensor codes, Tensor panels, Tensor start, Tensor slopes, Tensor bias, "
      "Tensor other, Tensor gain, Tensor shift, float epsilon, float step, int zero, "
      "bool keeps_sum) -> (Tensor, Tensor)",
      lamella::product_norm);
  m.def(
      "attention(Tensor query, Tensor key, Tensor value, Tensor? mask, float scale, "
      "float step, int zero) -> Tensor",
      lamella::attention);
  m.def(
      "product_attention(Tensor codes, Tensor panels, Tensor start, Tensor slopes, Tensor bias, "
      "int outputs, int[] shape, int[] starts, int heads, int size, Tensor? mask, float scale, "
      "float step, int zero) -> Tensor",
      lamella::product_attention);
}
