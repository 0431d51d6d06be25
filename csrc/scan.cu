// The scans of csrc/scan.cpp on a GPU: one warp walks one sequence from its end, 32 tokens at a time, and carries one
// state. A token maps the state behind it to its own; maps are composed in f64, in an order that depends on the
// sequence alone. No torch headers: plain pointers and a stream.
#include "cuda_launchers.h"

namespace {

constexpr int kWarp = 32, kWarps = 4;  // warps per block
constexpr unsigned kAll = 0xffffffffu;

// y -> add + factor y: the token's y[t] from y[t + 1].
struct Scan {
  double factor, add;

  __device__ static Scan identity() { return {1.0, 0.0}; }
  // This map after `behind`, that of the tokens behind this one.
  __device__ Scan after(const Scan& behind) const { return {factor * behind.factor, add + factor * behind.add}; }
  __device__ Scan shifted(int lanes) const {
    return {__shfl_up_sync(kAll, factor, lanes), __shfl_up_sync(kAll, add, lanes)};
  }
};

// (A, V) -> (a A + c V + b, d V + e), with A the advantage and V the value of the next token that counts.
struct Gae {
  double a, c, b, d, e;

  __device__ static Gae identity() { return {1.0, 0.0, 0.0, 1.0, 0.0}; }
  __device__ Gae after(const Gae& f) const {
    return {a * f.a, a * f.c + c * f.d, a * f.b + c * f.e + b, d * f.d, d * f.e + e};
  }
  __device__ Gae shifted(int lanes) const {
    return {__shfl_up_sync(kAll, a, lanes), __shfl_up_sync(kAll, c, lanes), __shfl_up_sync(kAll, b, lanes),
            __shfl_up_sync(kAll, d, lanes), __shfl_up_sync(kAll, e, lanes)};
  }
};

// Each lane's map after those of all lanes before it, which hold later tokens.
template <typename Map>
__device__ Map composed(Map map, int lane) {
  for (int lanes = 1; lanes < kWarp; lanes *= 2) {
    const Map behind = map.shifted(lanes);
    if (lane >= lanes) map = map.after(behind);
  }
  return map;
}

template <typename T>
__global__ void scan_sequences(const T* x, const T* decay, const int64_t* border, int64_t sequences, T* y) {
  const int lane = threadIdx.x % kWarp;
  const int64_t s = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (s >= sequences) return;
  const int64_t start = border[s], end = border[s + 1];
  double carried = 0.0;
  for (int64_t last = end - 1; last >= start; last -= kWarp) {
    const int64_t t = last - lane;
    Scan map = Scan::identity();
    // The last factor is never read: it may be NaN.
    if (t >= start) map = {t == end - 1 ? 0.0 : static_cast<double>(decay[t]), static_cast<double>(x[t])};
    map = composed(map, lane);
    const double value = map.add + map.factor * carried;
    if (t >= start) y[t] = static_cast<T>(value);
    carried = __shfl_sync(kAll, value, kWarp - 1);
  }
}

template <typename T>
__global__ void gae_sequences(const T* reward, const T* value, const int64_t* border, const bool* trained,
                              int64_t sequences, double gamma, double lam, bool skip, T* advantage, T* returns) {
  const int lane = threadIdx.x % kWarp;
  const int64_t s = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (s >= sequences) return;
  const int64_t start = border[s], end = border[s + 1];
  double carried = 0.0, next_value = 0.0;
  for (int64_t last = end - 1; last >= start; last -= kWarp) {
    const int64_t t = last - lane;
    const bool is_token = t >= start, counts = is_token && trained[t];
    Gae map = Gae::identity();
    if (counts) {
      const double v = value[t];
      map = {gamma * lam, gamma, reward[t] - v, 0.0, v};
    } else if (is_token && !skip) {  // a step with reward 0 and value 0
      map = {gamma * lam, gamma, 0.0, 0.0, 0.0};
    }
    map = composed(map, lane);
    const double a = map.a * carried + map.c * next_value + map.b, v = map.d * next_value + map.e;
    if (is_token) {
      advantage[t] = counts ? static_cast<T>(a) : T(0);
      returns[t] = counts ? static_cast<T>(a + v) : T(0);
    }
    carried = __shfl_sync(kAll, a, kWarp - 1);
    next_value = __shfl_sync(kAll, v, kWarp - 1);
  }
}

unsigned blocks(int64_t sequences) { return static_cast<unsigned>((sequences + kWarps - 1) / kWarps); }

template <typename T>
void launch_scan(const void* x, const void* decay, const int64_t* border, int64_t sequences, void* y,
                 cudaStream_t stream) {
  scan_sequences<T><<<blocks(sequences), kWarp * kWarps, 0, stream>>>(
      static_cast<const T*>(x), static_cast<const T*>(decay), border, sequences, static_cast<T*>(y));
}

template <typename T>
void launch_gae(const void* reward, const void* value, const int64_t* border, const bool* trained, int64_t sequences,
                double gamma, double lam, bool skip, void* advantage, void* returns, cudaStream_t stream) {
  gae_sequences<T><<<blocks(sequences), kWarp * kWarps, 0, stream>>>(
      static_cast<const T*>(reward), static_cast<const T*>(value), border, trained, sequences, gamma, lam, skip,
      static_cast<T*>(advantage), static_cast<T*>(returns));
}

}  // namespace

cudaError_t fastrl_reverse_scan(const void* x, const void* decay, const int64_t* cu_seqlens, int64_t sequences,
                                bool is_double, void* y, cudaStream_t stream) {
  if (sequences == 0) return cudaSuccess;
  const auto launch = is_double ? launch_scan<double> : launch_scan<float>;
  launch(x, decay, cu_seqlens, sequences, y, stream);
  return cudaGetLastError();
}

cudaError_t fastrl_gae(const void* reward, const void* value, const int64_t* cu_seqlens, const bool* trained,
                       int64_t sequences, double gamma, double lam, bool skip_observations, bool is_double,
                       void* advantage, void* returns, cudaStream_t stream) {
  if (sequences == 0) return cudaSuccess;
  const auto launch = is_double ? launch_gae<double> : launch_gae<float>;
  launch(reward, value, cu_seqlens, trained, sequences, gamma, lam, skip_observations, advantage, returns, stream);
  return cudaGetLastError();
}
