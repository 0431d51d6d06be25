// Attention of one decoding step in float32 on a CPU: head norms, rotations, the cache and the softmax in one pass.
// Specification: fastrl/rollout/decode_operators.py.
#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "fastrl.h"
#include "vectors.h"

namespace fastrl {
namespace {

struct Sizes {
  int64_t heads, key_heads, d, place;  // place of the new token in the cache
  float epsilon, scale;
};

// One head of one row: y = rotated(norm(x) weight), or rotated(x) without a weight.
FASTRL_INLINE void prepare(const float* x, const float* weight, const float* cos, const float* sin, const Sizes& sizes,
                           float* y) {
  const int64_t d = sizes.d, half = d / 2;
  float square = 0.0f;
#pragma omp simd reduction(+ : square)
  for (int64_t i = 0; i < d; ++i) square += x[i] * x[i];
  const float scale = weight == nullptr ? 1.0f : 1.0f / std::sqrt(square / static_cast<float>(d) + sizes.epsilon);
#pragma omp simd
  for (int64_t i = 0; i < half; ++i) {
    const float first = x[i] * scale * (weight == nullptr ? 1.0f : weight[i]);
    const float second = x[i + half] * scale * (weight == nullptr ? 1.0f : weight[i + half]);
    y[i] = first * cos[i] - second * sin[i];
    y[i + half] = second * cos[i + half] + first * sin[i + half];
  }
}

FASTRL_INLINE float dot(const float* x, const float* y, int64_t d) {
  float sum[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= d; i += kLanes) {
#pragma omp simd
    for (int64_t j = 0; j < kLanes; ++j) sum[j] += x[i + j] * y[i + j];
  }
  float result = total(sum);
  for (; i < d; ++i) result += x[i] * y[i];
  return result;
}

// y = sum over s < n of weight[s] x[s, :].
FASTRL_INLINE void weighted_sum(const float* weight, const float* x, int64_t n, int64_t d, float* y) {
  int64_t i = 0;
  for (; i + kLanes <= d; i += kLanes) {
    float sum[kLanes] = {};
    for (int64_t s = 0; s < n; ++s) {
      const float* row = x + s * d + i;
#pragma omp simd
      for (int64_t j = 0; j < kLanes; ++j) sum[j] += weight[s] * row[j];
    }
    for (int64_t j = 0; j < kLanes; ++j) y[i + j] = sum[j];
  }
  for (; i < d; ++i) {
    y[i] = 0.0f;
    for (int64_t s = 0; s < n; ++s) y[i] += weight[s] * x[s * d + i];
  }
}

// One row's key head and the query heads that share it. qkv [(H + 2 K), d] and head_norm [(H + K), d] of the row;
// keys, values [place + 1, d] get the new token; space has room for whole registers of scores and one query.
FASTRL_VECTORS void step(const float* qkv, const float* head_norm, const float* cos, const float* sin,
                         const float* mask, int64_t key_head, const Sizes& sizes, float* keys, float* values,
                         float* space, float* out) {
  const int64_t d = sizes.d, group = sizes.heads / sizes.key_heads, n = sizes.place + 1;
  const auto weight = [&](int64_t head) { return head_norm == nullptr ? nullptr : head_norm + head * d; };
  const int64_t key = sizes.heads + key_head;
  prepare(qkv + key * d, weight(key), cos, sin, sizes, keys + sizes.place * d);
  std::copy_n(qkv + (key + sizes.key_heads) * d, d, values + sizes.place * d);
  float* query = space + padded(n);
  const Row row{space, sizes.place, padded(n)};
  for (int64_t h = key_head * group; h < (key_head + 1) * group; ++h) {
    prepare(qkv + h * d, weight(h), cos, sin, sizes, query);
    for (int64_t s = 0; s < n; ++s) {
      space[s] = dot(query, keys + s * d, d) * sizes.scale + (mask == nullptr ? 0.0f : mask[s]);
    }
    row.scale(1.0f / row.exponentials(1.0f, row.top()));
    weighted_sum(space, values, n, d, out + h * d);
  }
}

void check_cache(const Tensor& x, int64_t rows, const Sizes& sizes, const char* name) {
  STD_TORCH_CHECK(x.is_cpu() && x.scalar_type() == ScalarType::Float && x.is_contiguous() && x.dim() == 4 &&
                      x.size(0) == rows && x.size(1) == sizes.key_heads && x.size(2) > sizes.place &&
                      x.size(3) == sizes.d,
                  name, " must be a contiguous float32 CPU tensor [B, K, room, d] with room for place ", sizes.place);
}

void check_numbers(const Tensor& x, int64_t n, const char* name) {
  STD_TORCH_CHECK(x.is_cpu() && x.scalar_type() == ScalarType::Float && x.is_contiguous() && x.numel() == n, name,
                  " must be a contiguous float32 CPU tensor with ", n, " numbers");
}

// qkv [B, (H + 2 K) d]; head_norm [(H + K), d]; cos, sin [B, d]; keys, values [B, K, room, d]; mask [B, place + 1].
Tensor decode_attention(const Tensor& qkv, std::optional<Tensor> head_norm, double epsilon, const Tensor& cos,
                        const Tensor& sin, Tensor keys, Tensor values, int64_t place, std::optional<Tensor> mask,
                        int64_t heads, double scale) {
  STD_TORCH_CHECK(qkv.dim() == 2 && keys.dim() == 4, "qkv must be [B, (H + 2 K) d] and keys [B, K, room, d]");
  const int64_t rows = qkv.size(0);
  const Sizes sizes{heads, keys.size(1), keys.size(3), place, static_cast<float>(epsilon), static_cast<float>(scale)};
  STD_TORCH_CHECK(sizes.key_heads > 0 && heads > 0 && heads % sizes.key_heads == 0 && sizes.d > 0 && sizes.d % 2 == 0,
                  "the heads of keys must divide ", heads, ", and their width must be even");
  STD_TORCH_CHECK(place >= 0, "place must be at least 0");
  const int64_t across = (heads + 2 * sizes.key_heads) * sizes.d;
  check_numbers(qkv, rows * across, "qkv");
  check_numbers(cos, rows * sizes.d, "cos");
  check_numbers(sin, rows * sizes.d, "sin");
  check_cache(keys, rows, sizes, "keys");
  check_cache(values, rows, sizes, "values");
  if (head_norm.has_value()) check_numbers(*head_norm, (heads + sizes.key_heads) * sizes.d, "head_norm");
  if (mask.has_value()) {
    STD_TORCH_CHECK(mask->is_cpu() && mask->scalar_type() == ScalarType::Float && mask->dim() == 2 &&
                        mask->size(0) == rows && mask->size(1) == place + 1 &&
                        (mask->stride(1) == 1 || place == 0),
                    "mask must be a float32 CPU tensor [B, place + 1] with contiguous rows");
  }
  Tensor out = torch::stable::new_empty(qkv, {rows, heads * sizes.d});
  const float* x = qkv.const_data_ptr<float>();
  const float* norm = head_norm.has_value() ? head_norm->const_data_ptr<float>() : nullptr;
  const float* c = cos.const_data_ptr<float>();
  const float* s = sin.const_data_ptr<float>();
  const float* m = mask.has_value() ? mask->const_data_ptr<float>() : nullptr;
  const int64_t mask_row = mask.has_value() ? mask->stride(0) : 0, room = keys.size(2);
  float* k = keys.mutable_data_ptr<float>();
  float* v = values.mutable_data_ptr<float>();
  float* o = out.mutable_data_ptr<float>();
  const int64_t d = sizes.d, units = rows * sizes.key_heads;
  torch::stable::parallel_for(0, units, 1 + 16384 / ((place + 1) * d), [&](int64_t from, int64_t to) {
    std::vector<float> space(padded(place + 1) + d);
    for (int64_t unit = from; unit < to; ++unit) {
      const int64_t row = unit / sizes.key_heads;
      step(x + row * across, norm, c + row * d, s + row * d, m == nullptr ? m : m + row * mask_row,
           unit % sizes.key_heads, sizes, k + unit * room * d, v + unit * room * d, space.data(),
           o + row * heads * d);
    }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastrl, library) {
  library.def(
      "decode_attention(Tensor qkv, Tensor? head_norm, float epsilon, Tensor cos, Tensor sin, Tensor(a!) keys, "
      "Tensor(b!) values, int place, Tensor? mask, int heads, float scale) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastrl, CPU, library) {
  library.impl("decode_attention", TORCH_BOX(&decode_attention));
}

}  // namespace fastrl
