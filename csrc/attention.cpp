// Causal attention inside each of many short sequences packed end to end, forward and backward, in float32 on a CPU.
// Specification: fastrl/train/packed_sdpa.py.
//
//   out[t] = sum over s <= t of p[t, s] v[s],  p[t, s] = exp(q[t] . k[s] scale - lse[t])
//   dv[s] = sum over t of p[t, s] g[t],  e[t, s] = p[t, s] (g[t] . v[s] - g[t] . out[t]) scale,
//   dq[t] = sum over s of e[t, s] k[s],  dk[s] = sum over t of e[t, s] q[t]
//
// A sequence's head fits the cache, so each of these sums is a small matrix product over copies padded to whole tiles.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

#include "fastrl.h"
#include "vectors.h"

namespace fastrl {
namespace {

constexpr int64_t kRows = 4;  // of a tile; its columns are one register

// c[r, :] = sum over i in [from, to) of a[r, i] b[i, :] for one tile of c; a is read with any strides.
FASTRL_INLINE void tile(const float* a, int64_t row, int64_t column, const float* b, int64_t ldb, int64_t from,
                        int64_t to, float* c, int64_t ldc) {
  float sum[kRows][kLanes];
  for (int64_t r = 0; r < kRows; ++r) {
    for (int64_t j = 0; j < kLanes; ++j) sum[r][j] = 0.0f;
  }
  for (int64_t i = from; i < to; ++i) {
    const float* x = b + i * ldb;
    const float* y = a + i * column;
    for (int64_t r = 0; r < kRows; ++r) {
      const float factor = y[r * row];
#pragma omp simd
      for (int64_t j = 0; j < kLanes; ++j) sum[r][j] += factor * x[j];
    }
  }
  for (int64_t r = 0; r < kRows; ++r) {
    for (int64_t j = 0; j < kLanes; ++j) c[r * ldc + j] = sum[r][j];
  }
}

struct Shape {
  int64_t heads, key_heads, d;  // of a position
  float scale;
};

// Buffers of one thread, for sequences of up to n positions. Padding is zero wherever a product reads it.
struct Workspace {
  int64_t n, d;  // padded
  std::vector<float> memory;
  float *q, *k, *v, *kt, *vt, *g, *p, *e, *dq, *dk, *dv;

  Workspace(int64_t longest, int64_t width, bool has_gradient) : n(padded(longest)), d(padded(width)) {
    const int64_t wide = n * d, square = n * n;
    memory.assign((has_gradient ? 9 : 5) * wide + (has_gradient ? 2 : 1) * square, 0.0f);
    float* next = memory.data();
    const auto take = [&next](int64_t size) { return std::exchange(next, next + size); };
    q = take(wide), k = take(wide), v = take(wide), kt = take(wide), dq = take(wide), p = take(square);
    vt = g = dk = dv = e = nullptr;
    if (has_gradient) vt = take(wide), g = take(wide), dk = take(wide), dv = take(wide), e = take(square);
  }
};

FASTRL_INLINE void copy_row(const float* x, int64_t d, float* y) {
#pragma omp simd
  for (int64_t i = 0; i < d; ++i) y[i] = x[i];
}

// y = x, or y += x where something is there already.
FASTRL_INLINE void add_row(const float* x, int64_t d, bool is_there, float* y) {
  if (!is_there) return copy_row(x, d, y);
#pragma omp simd
  for (int64_t i = 0; i < d; ++i) y[i] += x[i];
}

// x [length, stride] -> y [rows, wide], zero outside [length, d].
FASTRL_INLINE void copy_in(const float* x, int64_t stride, int64_t length, int64_t d, int64_t rows, int64_t wide,
                           float* y) {
  for (int64_t t = 0; t < length; ++t, y += wide) {
    copy_row(x + t * stride, d, y);
    for (int64_t i = d; i < wide; ++i) y[i] = 0.0f;
  }
  std::memset(y, 0, (rows - length) * wide * sizeof(float));
}

FASTRL_INLINE void transpose(const float* x, int64_t rows, int64_t wide, float* y) {
  for (int64_t i = 0; i < wide; ++i) {
    for (int64_t t = 0; t < rows; ++t) y[i * rows + t] = x[t * wide + i];
  }
}

// p [n, n] = q kt, the tiles on and below the diagonal.
FASTRL_INLINE void lower_product(const float* x, const float* yt, int64_t n, int64_t wide, int64_t d, float* p) {
  for (int64_t t = 0; t < n; t += kRows) {
    for (int64_t s = 0; s < t + kRows; s += kLanes) {
      tile(x + t * wide, wide, 1, yt + s, n, 0, d, p + t * n + s, n);
    }
  }
}

// y [n, wide] = p x with p lower triangular.
FASTRL_INLINE void weighted_rows(const float* p, const float* x, int64_t n, int64_t wide, float* y) {
  for (int64_t t = 0; t < n; t += kRows) {
    for (int64_t i = 0; i < wide; i += kLanes) {
      tile(p + t * n, n, 1, x + i, wide, 0, t + kRows, y + t * wide + i, wide);
    }
  }
}

// y [n, wide] = transposed p times x with p lower triangular.
FASTRL_INLINE void weighted_columns(const float* p, const float* x, int64_t n, int64_t wide, float* y) {
  for (int64_t s = 0; s < n; s += kRows) {
    for (int64_t i = 0; i < wide; i += kLanes) tile(p + s, 1, n, x + i, wide, s, n, y + s * wide + i, wide);
  }
}

// One sequence of one key head, for every query head that shares it.
FASTRL_VECTORS void attend(const float* q, const float* k, const float* v, int64_t length, const Shape& shape,
                           float* out, float* lse, Workspace& work) {
  const int64_t d = shape.d, n = padded(length), wide = work.d, group = shape.heads / shape.key_heads;
  copy_in(k, shape.key_heads * d, length, d, n, wide, work.k);
  copy_in(v, shape.key_heads * d, length, d, n, wide, work.v);
  transpose(work.k, n, wide, work.kt);
  for (int64_t h = 0; h < group; ++h, q += d, out += d, ++lse) {
    copy_in(q, shape.heads * d, length, d, n, wide, work.q);
    lower_product(work.q, work.kt, n, wide, d, work.p);
    for (int64_t t = 0; t < n; ++t) {
      const Row row{work.p + t * n, t, padded(t / kRows * kRows + kRows)};
      const float shift = row.top() * shape.scale;
      const float sum = row.exponentials(shape.scale, shift);
      row.scale(1.0f / sum);
      if (t < length) lse[t * shape.heads] = shift + std::log(sum);
    }
    weighted_rows(work.p, work.v, n, wide, work.dq);
    for (int64_t t = 0; t < length; ++t) copy_row(work.dq + t * wide, d, out + t * shape.heads * d);
  }
}

struct Gradients {
  float *dq, *dk, *dv;
};

FASTRL_VECTORS void attend_backward(const float* grad, const float* q, const float* k, const float* v,
                                    const float* out, const float* lse, int64_t length, const Shape& shape,
                                    Gradients to, Workspace& work) {
  const int64_t d = shape.d, n = padded(length), wide = work.d, group = shape.heads / shape.key_heads;
  const int64_t across = shape.heads * d, key_across = shape.key_heads * d;
  copy_in(k, key_across, length, d, n, wide, work.k);
  copy_in(v, key_across, length, d, n, wide, work.v);
  transpose(work.k, n, wide, work.kt);
  transpose(work.v, n, wide, work.vt);
  for (int64_t h = 0; h < group; ++h) {
    copy_in(q + h * d, across, length, d, n, wide, work.q);
    copy_in(grad + h * d, across, length, d, n, wide, work.g);
    lower_product(work.q, work.kt, n, wide, d, work.p);
    lower_product(work.g, work.vt, n, wide, d, work.e);
    for (int64_t t = 0; t < n; ++t) {
      const Row row{work.p + t * n, t, padded(t / kRows * kRows + kRows)};
      row.exponentials(shape.scale, t < length ? lse[t * shape.heads + h] : 0.0f);
      float dot = 0.0f;
      if (t < length) {
        const float* g = work.g + t * wide;
        const float* o = out + t * across + h * d;
#pragma omp simd reduction(+ : dot)
        for (int64_t i = 0; i < d; ++i) dot += g[i] * o[i];
      }
      float* e = work.e + t * n;
      for (int64_t s = 0; s < row.tiles; s += kLanes) {
#pragma omp simd
        for (int64_t i = s; i < s + kLanes; ++i) e[i] = row.p[i] * (e[i] - dot) * shape.scale;
      }
    }
    weighted_rows(work.e, work.k, n, wide, work.dq);
    weighted_columns(work.e, work.q, n, wide, work.dk);
    weighted_columns(work.p, work.g, n, wide, work.dv);
    for (int64_t t = 0; t < length; ++t) {
      copy_row(work.dq + t * wide, d, to.dq + t * across + h * d);
      add_row(work.dk + t * wide, d, h > 0, to.dk + t * key_across);
      add_row(work.dv + t * wide, d, h > 0, to.dv + t * key_across);
    }
  }
}

void check_packed(const Tensor& x, int64_t rows, int64_t d, const char* name) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 3 && x.is_contiguous() && x.scalar_type() == ScalarType::Float && d > 0 &&
                      x.size(0) == rows && x.size(2) == d,
                  name, " must be a contiguous float32 CPU tensor [T, heads, d] with T=", rows, " and d=", d);
}

struct Packed {
  const int64_t* border;
  int64_t sequences, longest, total;
};

Packed packed(const Tensor& cu_seqlens, int64_t total) {
  check_borders(cu_seqlens, total);
  Packed batch{cu_seqlens.const_data_ptr<int64_t>(), cu_seqlens.size(0) - 1, 0, total};
  for (int64_t s = 0; s < batch.sequences; ++s) {
    batch.longest = std::max(batch.longest, batch.border[s + 1] - batch.border[s]);
  }
  return batch;
}

Shape shape_of(const Tensor& query, const Tensor& key, const Tensor& value, double scale) {
  STD_TORCH_CHECK(query.dim() == 3 && key.dim() == 3, "query and key must be [T, heads, d]");
  const Shape shape{query.size(1), key.size(1), query.size(2), static_cast<float>(scale)};
  check_packed(query, query.size(0), shape.d, "query");
  check_packed(key, query.size(0), shape.d, "key");
  check_packed(value, query.size(0), shape.d, "value");
  STD_TORCH_CHECK(shape.key_heads > 0 && shape.heads % shape.key_heads == 0 && value.size(1) == shape.key_heads,
                  "value must have as many heads as key, and they must divide those of query");
  return shape;
}

// One unit of work per sequence and key head; a thread gets at least `tokens / longest` sequences.
template <typename Work>
void over_heads(const Packed& batch, const Shape& shape, bool has_gradient, const Work& work) {
  const int64_t units = batch.sequences * shape.key_heads;
  const int64_t least = 1 + 2048 * shape.key_heads / std::max<int64_t>(1, batch.longest);
  torch::stable::parallel_for(0, units, least, [&](int64_t from, int64_t to) {
    Workspace space(batch.longest, shape.d, has_gradient);
    for (int64_t unit = from; unit < to; ++unit) {
      const int64_t s = unit / shape.key_heads, first = batch.border[s];
      work(first, batch.border[s + 1] - first, unit % shape.key_heads, space);
    }
  });
}

std::tuple<Tensor, Tensor> packed_attention(const Tensor& query, const Tensor& key, const Tensor& value,
                                            const Tensor& cu_seqlens, double scale) {
  const Shape shape = shape_of(query, key, value, scale);
  const Packed batch = packed(cu_seqlens, query.size(0));
  Tensor out = torch::stable::empty_like(query);
  Tensor lse = torch::stable::new_empty(query, {batch.total, shape.heads});
  const float* q = query.const_data_ptr<float>();
  const float* k = key.const_data_ptr<float>();
  const float* v = value.const_data_ptr<float>();
  float* o = out.mutable_data_ptr<float>();
  float* l = lse.mutable_data_ptr<float>();
  const int64_t group = shape.heads / shape.key_heads;
  over_heads(batch, shape, false, [&](int64_t first, int64_t length, int64_t head, Workspace& space) {
    const int64_t at = (first * shape.heads + head * group) * shape.d;
    const int64_t key_at = (first * shape.key_heads + head) * shape.d;
    attend(q + at, k + key_at, v + key_at, length, shape, o + at, l + first * shape.heads + head * group, space);
  });
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> packed_attention_backward(const Tensor& grad, const Tensor& query,
                                                             const Tensor& key, const Tensor& value, const Tensor& out,
                                                             const Tensor& lse, const Tensor& cu_seqlens,
                                                             double scale) {
  const Shape shape = shape_of(query, key, value, scale);
  const Packed batch = packed(cu_seqlens, query.size(0));
  for (const auto& [x, name] : {std::pair{&grad, "grad"}, std::pair{&out, "out"}}) {
    check_packed(*x, batch.total, shape.d, name);
    STD_TORCH_CHECK(x->size(1) == shape.heads, name, " must have as many heads as query");
  }
  STD_TORCH_CHECK(lse.is_contiguous() && lse.numel() == batch.total * shape.heads, "lse must be [T, heads]");
  Tensor dquery = torch::stable::empty_like(query);
  Tensor dkey = torch::stable::empty_like(key), dvalue = torch::stable::empty_like(value);
  const float* g = grad.const_data_ptr<float>();
  const float* q = query.const_data_ptr<float>();
  const float* k = key.const_data_ptr<float>();
  const float* v = value.const_data_ptr<float>();
  const float* o = out.const_data_ptr<float>();
  const float* l = lse.const_data_ptr<float>();
  const Gradients to{dquery.mutable_data_ptr<float>(), dkey.mutable_data_ptr<float>(),
                     dvalue.mutable_data_ptr<float>()};
  const int64_t group = shape.heads / shape.key_heads;
  over_heads(batch, shape, true, [&](int64_t first, int64_t length, int64_t head, Workspace& space) {
    const int64_t at = (first * shape.heads + head * group) * shape.d;
    const int64_t key_at = (first * shape.key_heads + head) * shape.d;
    attend_backward(g + at, q + at, k + key_at, v + key_at, o + at, l + first * shape.heads + head * group, length,
                    shape, {to.dq + at, to.dk + key_at, to.dv + key_at}, space);
  });
  return {dquery, dkey, dvalue};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastrl, library) {
  library.def(
      "packed_attention(Tensor query, Tensor key, Tensor value, Tensor cu_seqlens, float scale) -> (Tensor, Tensor)");
  library.def(
      "packed_attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, "
      "Tensor cu_seqlens, float scale) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fastrl, CPU, library) {
  library.impl("packed_attention", TORCH_BOX(&packed_attention));
  library.impl("packed_attention_backward", TORCH_BOX(&packed_attention_backward));
}

}  // namespace fastrl
