// y[t] = x[t] + decay[t] y[t + 1] inside each sequence, and generalised advantage estimation, one pass each.
// Specification: fastrl/ops/reverse_scan.py and fastrl/ops/gae.py.
#include "fastrl.h"

namespace fastrl {
namespace {

// Carried in f64, so that a long f32 sequence loses nothing.
template <typename T>
void scan_sequences(const Tensor& x, const Tensor& decay, const Tensor& cu_seqlens, Tensor& y) {
  const T* in = x.const_data_ptr<T>();
  const T* factor = decay.const_data_ptr<T>();
  const int64_t* border = cu_seqlens.const_data_ptr<int64_t>();
  T* out = y.mutable_data_ptr<T>();
  const int64_t sequences = cu_seqlens.size(0) - 1;
  torch::stable::parallel_for(0, sequences, grain(sequences, x.numel()), [&](int64_t first, int64_t last) {
    for (int64_t s = first; s < last; ++s) {
      double carried = 0.0;
      for (int64_t t = border[s + 1] - 1; t >= border[s]; --t) {
        const bool at_end = t == border[s + 1] - 1;  // the last factor is never read: it may be NaN
        carried = at_end ? static_cast<double>(in[t]) : in[t] + factor[t] * carried;
        out[t] = static_cast<T>(carried);
      }
    }
  });
}

Tensor reverse_scan(const Tensor& x, const Tensor& decay, const Tensor& cu_seqlens) {
  check_vector(x, x.numel(), "x");
  check_vector(decay, x.numel(), "decay");
  check_borders(cu_seqlens, x.numel());
  Tensor y = torch::stable::empty_like(x);
  if (x.scalar_type() == ScalarType::Double) {
    scan_sequences<double>(x, decay, cu_seqlens, y);
  } else {
    scan_sequences<float>(x, decay, cu_seqlens, y);
  }
  return y;
}

struct GaeNumbers {
  double gamma;
  double lam;
  bool skip;
};

template <typename T>
void gae_sequences(const Tensor& reward, const Tensor& value, const Tensor& cu_seqlens, const Tensor& trained,
                   GaeNumbers numbers, Tensor& advantage, Tensor& returns) {
  const T* r = reward.const_data_ptr<T>();
  const T* v = value.const_data_ptr<T>();
  const bool* is_trained = trained.const_data_ptr<bool>();
  const int64_t* border = cu_seqlens.const_data_ptr<int64_t>();
  T* a = advantage.mutable_data_ptr<T>();
  T* ret = returns.mutable_data_ptr<T>();
  const double gamma = numbers.gamma;
  const double gamma_lam = numbers.gamma * numbers.lam;
  const int64_t sequences = cu_seqlens.size(0) - 1;
  torch::stable::parallel_for(0, sequences, grain(sequences, reward.numel()), [&](int64_t first, int64_t last) {
    for (int64_t s = first; s < last; ++s) {
      double next_value = 0.0;
      double carried = 0.0;
      for (int64_t t = border[s + 1] - 1; t >= border[s]; --t) {
        if (is_trained[t]) {
          carried = r[t] + gamma * next_value - v[t] + gamma_lam * carried;
          next_value = v[t];
          a[t] = static_cast<T>(carried);
          ret[t] = static_cast<T>(carried + next_value);
          continue;
        }
        if (!numbers.skip) {  // a step with reward 0 and value 0
          carried = gamma * next_value + gamma_lam * carried;
          next_value = 0.0;
        }
        a[t] = ret[t] = T(0);
      }
    }
  });
}

std::tuple<Tensor, Tensor> gae(const Tensor& reward, const Tensor& value, const Tensor& cu_seqlens,
                               const Tensor& trained, double gamma, double lam, bool skip_observations) {
  const int64_t total = reward.numel();
  check_vector(reward, total, "reward");
  check_vector(value, total, "value");
  check_vector(trained, total, "trained");
  check_borders(cu_seqlens, total);
  Tensor advantage = torch::stable::empty_like(reward);
  Tensor returns = torch::stable::empty_like(reward);
  const GaeNumbers numbers{gamma, lam, skip_observations};
  if (reward.scalar_type() == ScalarType::Double) {
    gae_sequences<double>(reward, value, cu_seqlens, trained, numbers, advantage, returns);
  } else {
    gae_sequences<float>(reward, value, cu_seqlens, trained, numbers, advantage, returns);
  }
  return {advantage, returns};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastrl, library) {
  library.def("reverse_scan(Tensor x, Tensor decay, Tensor cu_seqlens) -> Tensor");
  library.def(
      "gae(Tensor reward, Tensor value, Tensor cu_seqlens, Tensor trained, float gamma, float lam, "
      "bool skip_observations) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fastrl, CPU, library) {
  library.impl("reverse_scan", TORCH_BOX(&reverse_scan));
  library.impl("gae", TORCH_BOX(&gae));
}

}  // namespace fastrl
