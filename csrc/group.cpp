// Group-relative advantages of ragged groups. Specification: fastrl/ops/group_advantage.py.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "fastrl.h"

namespace fastrl {
namespace {

// fastrl.ops.group_advantage.Baseline and Scale.
enum Baseline : int64_t { kRaw = 0, kMean = 1, kLeaveOneOut = 2 };
enum Scale : int64_t { kUnscaled = 0, kGroup = 1, kBatch = 2 };

struct Statistics {
  int64_t count = 0;
  double mean = 0.0;
  double std = 0.0;  // exactly 0 for equal rewards and for too few of them
  bool varies = false;
};

template <typename T>
Statistics statistics(const T* reward, const int64_t* member, int64_t n, int64_t ddof) {
  Statistics result;
  double sum = 0.0, low = INFINITY, high = -INFINITY;
  for (int64_t i = 0; i < n; ++i) {
    const double r = reward[member[i]];
    sum += r;
    low = std::min(low, r);
    high = std::max(high, r);
  }
  result.count = n;
  result.varies = high > low;
  if (n == 0) return result;
  result.mean = sum / n;
  if (!result.varies || n <= ddof) return result;
  double squares = 0.0;
  for (int64_t i = 0; i < n; ++i) {
    const double centred = reward[member[i]] - result.mean;
    squares += centred * centred;
  }
  result.std = std::sqrt(squares / (n - ddof));
  return result;
}

template <typename T>
void advantages(const Tensor& reward, const Tensor& group, int64_t baseline, int64_t scale, int64_t ddof, double eps,
                Tensor& advantage) {
  const int64_t n = reward.numel();
  const T* r = reward.const_data_ptr<T>();
  const int64_t* g = group.const_data_ptr<int64_t>();
  T* a = advantage.mutable_data_ptr<T>();
  std::vector<int64_t> order;  // judged rollouts, group after group
  order.reserve(n);
  for (int64_t s = 0; s < n; ++s) {
    a[s] = T(0);
    if (std::isfinite(r[s])) order.push_back(s);
  }
  const auto before = [g](int64_t x, int64_t y) { return g[x] < g[y] || (g[x] == g[y] && x < y); };
  if (!std::is_sorted(order.begin(), order.end(), before)) std::sort(order.begin(), order.end(), before);
  const int64_t judged = order.size();
  const double batch_std = scale == kBatch ? statistics(r, order.data(), judged, ddof).std : 0.0;
  for (int64_t first = 0, last = 0; first < judged; first = last) {
    while (last < judged && g[order[last]] == g[order[first]]) ++last;
    const Statistics of = statistics(r, order.data() + first, last - first, ddof);
    const double std = scale == kGroup ? of.std : batch_std;
    if (baseline != kRaw && !of.varies) continue;
    if (scale != kUnscaled && !(std > 0.0)) continue;
    const double others = baseline == kLeaveOneOut ? static_cast<double>(of.count) / (of.count - 1) : 1.0;
    const double divisor = scale == kUnscaled ? 1.0 : std + eps;
    const double mean = baseline == kRaw ? 0.0 : of.mean;
    for (int64_t i = first; i < last; ++i) {
      a[order[i]] = static_cast<T>((r[order[i]] - mean) * others / divisor);
    }
  }
}

Tensor group_advantage(const Tensor& reward, const Tensor& group, int64_t baseline, int64_t scale, int64_t ddof,
                       double eps) {
  check_vector(reward, reward.numel(), "reward");
  check_vector(group, reward.numel(), "group");
  Tensor advantage = torch::stable::empty_like(reward);
  if (reward.scalar_type() == ScalarType::Double) {
    advantages<double>(reward, group, baseline, scale, ddof, eps, advantage);
  } else {
    advantages<float>(reward, group, baseline, scale, ddof, eps, advantage);
  }
  return advantage;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastrl, library) {
  library.def(
      "group_advantage(Tensor reward, Tensor group, int baseline, int scale, int ddof, float eps) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastrl, CPU, library) {
  library.impl("group_advantage", TORCH_BOX(&group_advantage));
}

}  // namespace fastrl
