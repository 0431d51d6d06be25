// Group-relative advantages of csrc/group.cpp on a GPU: rollouts are sorted by group, then one block reduces one
// group, in f64 and in an order that depends on the group alone. No atomics, no host sync, no torch headers.
#include <cub/device/device_radix_sort.cuh>

#include "cuda_launchers.h"

namespace {

constexpr int kThreads = 128;

// fastrl.ops.group_advantage.Baseline and Scale.
enum Baseline : int64_t { kRaw = 0, kMean = 1, kLeaveOneOut = 2 };
enum Scale : int64_t { kUnscaled = 0, kGroup = 1, kBatch = 2 };

struct Statistics {
  double count, mean, std;  // std is exactly 0 for equal rewards and for too few of them
  bool varies;
};

struct Numbers {
  int64_t baseline, scale, ddof;
  double eps;
};

struct Add {
  __device__ double operator()(double x, double y) const { return x + y; }
};
struct Least {
  __device__ double operator()(double x, double y) const { return y < x ? y : x; }
};
struct Most {
  __device__ double operator()(double x, double y) const { return y > x ? y : x; }
};

// All threads of the block get the reduction of their numbers; a tree of fixed shape.
template <typename Reduce>
__device__ double reduced(double mine, Reduce reduce) {
  __shared__ double shared[kThreads];
  shared[threadIdx.x] = mine;
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) shared[threadIdx.x] = reduce(shared[threadIdx.x], shared[threadIdx.x + half]);
    __syncthreads();
  }
  const double result = shared[0];
  __syncthreads();
  return result;
}

// Of the finite rewards of rollouts order[first .. last).
template <typename T>
__device__ Statistics statistics(const T* reward, const int64_t* order, int64_t first, int64_t last, int64_t ddof) {
  double count = 0.0, sum = 0.0, low = INFINITY, high = -INFINITY;
  for (int64_t i = first + threadIdx.x; i < last; i += kThreads) {
    const double r = reward[order[i]];
    if (!isfinite(r)) continue;
    count += 1.0;
    sum += r;
    low = fmin(low, r);
    high = fmax(high, r);
  }
  Statistics result{reduced(count, Add()), 0.0, 0.0, false};
  sum = reduced(sum, Add());
  result.varies = reduced(high, Most()) > reduced(low, Least());
  result.mean = result.count > 0.0 ? sum / result.count : 0.0;
  double squares = 0.0;
  for (int64_t i = first + threadIdx.x; i < last; i += kThreads) {
    const double r = reward[order[i]];
    if (isfinite(r)) squares += (r - result.mean) * (r - result.mean);
  }
  squares = reduced(squares, Add());
  if (result.varies && result.count > ddof) result.std = sqrt(squares / (result.count - ddof));
  return result;
}

__global__ void count_up(int64_t* index, int64_t n) {
  const int64_t s = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (s < n) index[s] = s;
}

template <typename T>
__global__ void batch_deviation(const T* reward, const int64_t* order, int64_t n, int64_t ddof, double* std) {
  const Statistics of = statistics(reward, order, 0, n, ddof);
  if (threadIdx.x == 0) *std = of.std;
}

// The block of a group's first rollout in sorted order works; the others have nothing to do.
template <typename T>
__global__ void advantages(const T* reward, const int64_t* key, const int64_t* order, int64_t n, Numbers numbers,
                           const double* batch_std, T* advantage) {
  const int64_t first = blockIdx.x;
  if (first > 0 && key[first] == key[first - 1]) return;
  int64_t low = first, high = n;  // the group's end, by bisection: key[low] is in it, key[high] is not
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    (key[middle] == key[first] ? low : high) = middle;
  }
  const Statistics of = statistics(reward, order, first, high, numbers.ddof);
  const double std = numbers.scale == kBatch ? *batch_std : of.std;
  const bool is_zero = (numbers.baseline != kRaw && !of.varies) || (numbers.scale != kUnscaled && !(std > 0.0));
  const double others = numbers.baseline == kLeaveOneOut ? of.count / (of.count - 1.0) : 1.0;
  const double divisor = numbers.scale == kUnscaled ? 1.0 : std + numbers.eps;
  const double mean = numbers.baseline == kRaw ? 0.0 : of.mean;
  for (int64_t i = first + threadIdx.x; i < high; i += kThreads) {
    const double r = reward[order[i]];
    advantage[order[i]] = is_zero || !isfinite(r) ? T(0) : static_cast<T>((r - mean) * others / divisor);
  }
}

// The workspace: three vectors [S] of int64, one f64, and what the sort asks for.
struct Workspace {
  int64_t *index, *key, *order;
  double* batch_std;
  void* sort;

  Workspace(void* memory, int64_t n)
      : index(static_cast<int64_t*>(memory)),
        key(index + n),
        order(key + n),
        batch_std(reinterpret_cast<double*>(order + n)),
        sort(batch_std + 1) {}
};

cudaError_t sort_pairs(void* memory, size_t& bytes, const int64_t* group, int64_t* key, const int64_t* index,
                       int64_t* order, int64_t n, cudaStream_t stream) {
  return cub::DeviceRadixSort::SortPairs(memory, bytes, group, key, index, order, n, 0, 64, stream);  // stable
}

template <typename T>
cudaError_t launch(const T* reward, const int64_t* group, int64_t n, Numbers numbers, T* advantage, Workspace memory,
                   cudaStream_t stream) {
  size_t bytes = 0;
  const auto sorted = [&](void* place) {
    return sort_pairs(place, bytes, group, memory.key, memory.index, memory.order, n, stream);
  };
  count_up<<<static_cast<unsigned>((n + kThreads - 1) / kThreads), kThreads, 0, stream>>>(memory.index, n);
  if (const cudaError_t error = sorted(nullptr); error != cudaSuccess) return error;
  if (const cudaError_t error = sorted(memory.sort); error != cudaSuccess) return error;
  if (numbers.scale == kBatch) {
    batch_deviation<<<1, kThreads, 0, stream>>>(reward, memory.order, n, numbers.ddof, memory.batch_std);
  }
  advantages<<<static_cast<unsigned>(n), kThreads, 0, stream>>>(reward, memory.key, memory.order, n, numbers,
                                                                memory.batch_std, advantage);
  return cudaGetLastError();
}

}  // namespace

size_t fastrl_group_advantage_workspace(int64_t rollouts) {
  size_t bytes = 0;
  sort_pairs(nullptr, bytes, nullptr, nullptr, nullptr, nullptr, rollouts, nullptr);
  return 3 * sizeof(int64_t) * rollouts + sizeof(double) + bytes;
}

cudaError_t fastrl_group_advantage(const void* reward, const int64_t* group, int64_t rollouts, int64_t baseline,
                                   int64_t scale, int64_t ddof, double eps, bool is_double, void* advantage,
                                   void* workspace, cudaStream_t stream) {
  if (rollouts == 0) return cudaSuccess;
  const Numbers numbers{baseline, scale, ddof, eps};
  const Workspace memory(workspace, rollouts);
  if (is_double) {
    return launch(static_cast<const double*>(reward), group, rollouts, numbers, static_cast<double*>(advantage),
                  memory, stream);
  }
  return launch(static_cast<const float*>(reward), group, rollouts, numbers, static_cast<float*>(advantage), memory,
                stream);
}
