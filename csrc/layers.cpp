// The elementwise parts of a Llama-like layer on a CPU, forward and backward, in float32.
// Specification: the modules of transformers that fastrl/train/native_layers.py replaces.
//
//   norm     y = x r w,  r = 1 / sqrt(mean(x^2) + eps);
//            dx = r (g w - x mean(g w x) r^2),  dw = sum over rows of g x r
//   swiglu   y = silu(a) b,  silu(a) = a s,  s = 1 / (1 + exp(-a));   da = g b s (1 + a (1 - s)),  db = g a s
//   rotary   (y1, y2) = (x1 cos - x2 sin, x2 cos + x1 sin), halves of a head; its transpose turns by the other sign
#include <algorithm>
#include <cmath>
#include <vector>

#include "fastrl.h"
#include "vectors.h"

namespace fastrl {
namespace {

constexpr int64_t kRows = 64;         // of a block: its share of a weight's gradient is summed in f32, blocks in f64
constexpr int64_t kGrain = 1 << 15;  // elements per thread

FASTRL_INLINE float sigmoid(float a) { return 1.0f / (1.0f + exponential(-a)); }

FASTRL_VECTORS void norm_rows(const float* x, const float* w, float eps, int64_t rows, int64_t d, float* y, float* r) {
  for (int64_t n = 0; n < rows; ++n, x += d, y += d) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < d; ++i) sum += x[i] * x[i];
    const float scale = 1.0f / std::sqrt(sum / static_cast<float>(d) + eps);
    r[n] = scale;
#pragma omp simd
    for (int64_t i = 0; i < d; ++i) y[i] = x[i] * scale * w[i];
  }
}

// dw [d] gets this block's sum.
FASTRL_VECTORS void norm_rows_backward(const float* g, const float* x, const float* w, const float* r, int64_t rows,
                                       int64_t d, float* dx, float* dw) {
  std::fill_n(dw, d, 0.0f);
  for (int64_t n = 0; n < rows; ++n, g += d, x += d, dx += d) {
    const float scale = r[n];
    float dot = 0.0f;
#pragma omp simd reduction(+ : dot)
    for (int64_t i = 0; i < d; ++i) {
      const float gx = g[i] * x[i];
      dw[i] += gx * scale;
      dot += gx * w[i];
    }
    const float share = dot * scale * scale / static_cast<float>(d);
#pragma omp simd
    for (int64_t i = 0; i < d; ++i) dx[i] = scale * (g[i] * w[i] - x[i] * share);
  }
}

FASTRL_VECTORS void swiglu_span(const float* a, const float* b, int64_t n, float* y) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) y[i] = a[i] * sigmoid(a[i]) * b[i];
}

FASTRL_VECTORS void swiglu_span_backward(const float* g, const float* a, const float* b, int64_t n, float* da,
                                         float* db) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float s = sigmoid(a[i]);
    da[i] = g[i] * b[i] * s * (1.0f + a[i] * (1.0f - s));
    db[i] = g[i] * a[i] * s;
  }
}

FASTRL_VECTORS void rotary_rows(const float* x, const float* cos, const float* sin, float sign, int64_t rows,
                                int64_t heads, int64_t d, float* y) {
  const int64_t half = d / 2;
  for (int64_t t = 0; t < rows; ++t, cos += d, sin += d) {
    for (int64_t h = 0; h < heads; ++h, x += d, y += d) {
#pragma omp simd
      for (int64_t i = 0; i < half; ++i) {
        const float first = x[i], second = x[i + half];
        y[i] = first * cos[i] - sign * second * sin[i];
        y[i + half] = second * cos[i + half] + sign * first * sin[i + half];
      }
    }
  }
}

void check_floats(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.is_cpu() && x.is_contiguous() && x.scalar_type() == ScalarType::Float, name,
                  " must be a contiguous float32 CPU tensor");
}

void check_alike(const Tensor& x, const Tensor& y, const char* name) {
  check_floats(y, name);
  STD_TORCH_CHECK(x.numel() == y.numel(), name, " must have ", x.numel(), " elements, got ", y.numel());
}

Tensor empty(const Tensor& like, int64_t n) { return torch::stable::new_empty(like, {n}); }

// Rows of x, whose last axis is as long as the weight.
int64_t rows_of(const Tensor& x, const Tensor& weight) {
  check_floats(x, "x");
  check_floats(weight, "weight");
  const int64_t d = weight.numel();
  STD_TORCH_CHECK(x.dim() >= 1 && d >= 1 && x.size(x.dim() - 1) == d, "x must be [..., D] with D=", d, " as weight");
  return x.numel() / d;
}

std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  const int64_t rows = rows_of(x, weight), d = weight.numel();
  Tensor y = torch::stable::empty_like(x), scale = empty(x, rows);
  const float* in = x.const_data_ptr<float>();
  const float* w = weight.const_data_ptr<float>();
  float* out = y.mutable_data_ptr<float>();
  float* r = scale.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, rows, 1 + kGrain / d, [&](int64_t from, int64_t to) {
    norm_rows(in + from * d, w, static_cast<float>(eps), to - from, d, out + from * d, r + from);
  });
  return {y, scale};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                             const Tensor& scale) {
  const int64_t rows = rows_of(x, weight), d = weight.numel();
  check_alike(x, grad, "grad");
  check_floats(scale, "scale");
  STD_TORCH_CHECK(scale.numel() == rows, "scale must have one number per row");
  Tensor dx = torch::stable::empty_like(x), dw = torch::stable::empty_like(weight);
  const float* g = grad.const_data_ptr<float>();
  const float* in = x.const_data_ptr<float>();
  const float* w = weight.const_data_ptr<float>();
  const float* r = scale.const_data_ptr<float>();
  float* out = dx.mutable_data_ptr<float>();
  const int64_t blocks = (rows + kRows - 1) / kRows;
  std::vector<float> part(blocks * d);  // the same blocks whatever the number of threads: the same sum
  torch::stable::parallel_for(0, blocks, 1 + kGrain / (kRows * d), [&](int64_t from, int64_t to) {
    for (int64_t block = from; block < to; ++block) {
      const int64_t first = block * kRows, n = std::min(kRows, rows - first);
      norm_rows_backward(g + first * d, in + first * d, w, r + first, n, d, out + first * d, part.data() + block * d);
    }
  });
  std::vector<double> total(d, 0.0);
  for (int64_t block = 0; block < blocks; ++block) {
    for (int64_t i = 0; i < d; ++i) total[i] += part[block * d + i];
  }
  std::copy(total.begin(), total.end(), dw.mutable_data_ptr<float>());
  return {dx, dw};
}

// gate and up may be halves of one matrix [T, 2 D].
Tensor swiglu(const Tensor& gate, const Tensor& up) {
  STD_TORCH_CHECK(gate.dim() == 2 && up.dim() == 2 && gate.size(0) == up.size(0) && gate.size(1) == up.size(1),
                  "gate and up must be [T, D] both");
  for (const Tensor* x : {&gate, &up}) {
    STD_TORCH_CHECK(x->is_cpu() && x->scalar_type() == ScalarType::Float && (x->stride(1) == 1 || x->numel() == 0),
                    "gate and up must be float32 CPU tensors with contiguous rows");
  }
  const int64_t rows = gate.size(0), d = gate.size(1), gate_row = gate.stride(0), up_row = up.stride(0);
  Tensor y = torch::stable::new_empty(gate, {rows, d});
  const float* a = gate.const_data_ptr<float>();
  const float* b = up.const_data_ptr<float>();
  float* out = y.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, rows, 1 + kGrain / std::max<int64_t>(1, d), [&](int64_t from, int64_t to) {
    for (int64_t t = from; t < to; ++t) swiglu_span(a + t * gate_row, b + t * up_row, d, out + t * d);
  });
  return y;
}

std::tuple<Tensor, Tensor> swiglu_backward(const Tensor& grad, const Tensor& gate, const Tensor& up) {
  check_floats(gate, "gate");
  check_alike(gate, up, "up");
  check_alike(gate, grad, "grad");
  Tensor dgate = torch::stable::empty_like(gate), dup = torch::stable::empty_like(gate);
  const float* g = grad.const_data_ptr<float>();
  const float* a = gate.const_data_ptr<float>();
  const float* b = up.const_data_ptr<float>();
  float* da = dgate.mutable_data_ptr<float>();
  float* db = dup.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, gate.numel(), kGrain, [&](int64_t from, int64_t to) {
    swiglu_span_backward(g + from, a + from, b + from, to - from, da + from, db + from);
  });
  return {dgate, dup};
}

// x [T, H, d], cos and sin [T, d].
Tensor rotary(const Tensor& x, const Tensor& cos, const Tensor& sin, bool transposed) {
  check_floats(x, "x");
  check_floats(cos, "cos");
  check_alike(cos, sin, "sin");
  STD_TORCH_CHECK(x.dim() == 3 && x.size(2) % 2 == 0, "x must be [T, H, d] with an even d");
  const int64_t rows = x.size(0), heads = x.size(1), d = x.size(2);
  STD_TORCH_CHECK(cos.numel() == rows * d, "cos must be [T, d] with T=", rows, " and d=", d, " as x");
  Tensor y = torch::stable::empty_like(x);
  const float* in = x.const_data_ptr<float>();
  const float* c = cos.const_data_ptr<float>();
  const float* s = sin.const_data_ptr<float>();
  float* out = y.mutable_data_ptr<float>();
  const float sign = transposed ? -1.0f : 1.0f;
  torch::stable::parallel_for(0, rows, 1 + kGrain / std::max<int64_t>(1, heads * d), [&](int64_t from, int64_t to) {
    const int64_t at = from * heads * d;
    rotary_rows(in + at, c + from * d, s + from * d, sign, to - from, heads, d, out + at);
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastrl, library) {
  library.def("rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)");
  library.def("rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor scale) -> (Tensor, Tensor)");
  library.def("swiglu(Tensor gate, Tensor up) -> Tensor");
  library.def("swiglu_backward(Tensor grad, Tensor gate, Tensor up) -> (Tensor, Tensor)");
  library.def("rotary(Tensor x, Tensor cos, Tensor sin, bool transposed) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastrl, CPU, library) {
  library.impl("rms_norm", TORCH_BOX(&rms_norm));
  library.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
  library.impl("swiglu", TORCH_BOX(&swiglu));
  library.impl("swiglu_backward", TORCH_BOX(&swiglu_backward));
  library.impl("rotary", TORCH_BOX(&rotary));
}

}  // namespace fastrl
