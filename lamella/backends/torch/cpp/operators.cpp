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

constexpr int64_t CHUNK = 64;  // queries of one piece of work
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
  over_parts(rows, weight, [&](const Part& part) {
    multiply(from, part, weight, finish);
    if (!are_few(rows, weight)) apply(part.row, part.row_end);
  });
  // Otherwise no part has whole rows.
  if (are_few(rows, weight)) over_rows(rows, apply);
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

  // Heads of one width lie apart by a row: no processor foresees that.
  void prefetch(int64_t b, int64_t h, int64_t rows) const {
    const at::BFloat16* first = at(b, h);
    for (int64_t i = 0; i < rows; ++i) __builtin_prefetch(first + i * row, 0, 2);
  }
};

at::Tensor attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                     const std::optional<at::Tensor>& mask, double scale, double step,
                     int64_t zero) {
  const at::Tensor q = in_pairs(query), k = in_pairs(key), v = in_pairs(value);
  const int64_t batch = q.size(0), heads = q.size(1), rows = q.size(2), size = q.size(3);
  const int64_t count = k.size(2), chunks = (rows + CHUNK - 1) / CHUNK;
  TORCH_CHECK(size % LANES == 0 && v.size(3) == size, "heads must be whole sixteens wide");
  at::Tensor out = at::empty({batch, rows, heads * size}, q.options().dtype(at::kByte));
  at::Tensor added;
  if (mask || count % LANES != 0) added = penalties(mask, count);
  const float* penalty = added.defined() ? added.const_data_ptr<float>() : nullptr;
  const int64_t apart = added.defined() && added.size(0) > 1 ? added.size(1) : 0;
  const Heads queries(q), keys(k), values(v);
  uint8_t* to = out.mutable_data_ptr<uint8_t>();
  const Grid grid(step, zero);
  const float factor = static_cast<float>(scale * LOG2_E);
  at::parallel_for(0, batch * heads * chunks, 1, [&](int64_t begin, int64_t end) {
    Head head(count, size);
    int64_t last = -1;
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t b = piece / chunks / heads, h = piece / chunks % heads;
      if (piece / chunks != last) {
        head.read_keys(keys.at(b, h), keys.row);
        head.read_values(values.at(b, h), values.row);
        last = piece / chunks;
        const int64_t next = last + 1;
        if (next < batch * heads) {
          queries.prefetch(next / heads, next % heads, rows);
          keys.prefetch(next / heads, next % heads, count);
          values.prefetch(next / heads, next % heads, count);
        }
      }
      const int64_t first = piece % chunks * CHUNK, stop = std::min(rows, first + CHUNK);
      for (int64_t i = first; i < stop; i += QUERIES) {
        uint8_t* place = to + ((b * rows + i) * heads + h) * size;
        const auto finish = [&](int64_t r, int64_t d, __m512 x) {
          store(place + r * heads * size + d, 0xFFFF, grid.codes(x));
        };
        head.attend(queries.at(b, h) + i * queries.row, queries.row,
                    std::min<int64_t>(QUERIES, stop - i),
                    penalty == nullptr ? nullptr : penalty + b * apart, factor, finish);
      }
    }
  });
  return out;
}

// The same, where queries, keys and values are parts of the last axis of one tensor.
at::Tensor attention_of_parts(const at::Tensor& joined, at::IntArrayRef starts, int64_t heads,
                              int64_t size, const std::optional<at::Tensor>& mask, double scale,
                              double step, int64_t zero) {
  TORCH_CHECK(joined.dim() == 3 && starts.size() == 3, "parts of [batch, rows, width] are read");
  const auto part = [&](int64_t start) {
    const at::Tensor wide = joined.narrow(2, start, heads * size);
    return wide.view({joined.size(0), joined.size(1), heads, size}).transpose(1, 2);
  };
  const at::Tensor query = part(starts[0]), key = part(starts[1]), value = part(starts[2]);
  return attention(query, key, value, mask, scale, step, zero);
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
      "attention_of_parts(Tensor joined, int[] starts, int heads, int size, Tensor? mask, "
      "float scale, float step, int zero) -> Tensor",
      lamella::attention_of_parts);
}
