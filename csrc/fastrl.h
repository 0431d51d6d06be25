// What every op of fastrl._C shares. CPU only, through torch's stable ABI: one binary serves torch 2.10 and later.
#pragma once

#define TORCH_TARGET_VERSION (((0ULL + 2) << 56) | ((0ULL + 10) << 48))

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <tuple>

namespace fastrl {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The Python op has checked shapes, types and contiguity for its users; these checks protect memory from
// direct calls of torch.ops.fastrl.*.
inline void check_vector(const Tensor& x, int64_t n, const char* name) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 1 && x.size(0) == n && x.is_contiguous(), name,
                  " must be a contiguous CPU vector of length ", n);
}

inline void check_borders(const Tensor& cu_seqlens, int64_t total) {
  STD_TORCH_CHECK(cu_seqlens.dim() == 1 && cu_seqlens.size(0) >= 1, "cu_seqlens must be [S + 1]");
  check_vector(cu_seqlens, cu_seqlens.size(0), "cu_seqlens");
  const int64_t* border = cu_seqlens.const_data_ptr<int64_t>();
  const int64_t sequences = cu_seqlens.size(0) - 1;
  bool rising = border[0] == 0 && border[sequences] == total;
  for (int64_t s = 0; s < sequences; ++s) rising = rising && border[s] <= border[s + 1];
  STD_TORCH_CHECK(rising, "cu_seqlens must rise from 0 to ", total);
}

// Sequences per thread: few enough to balance, enough to pay for the start of a thread.
inline int64_t grain(int64_t sequences, int64_t total) {
  constexpr int64_t tokens = 16384;
  return total == 0 ? 1 : 1 + sequences * tokens / total;
}

}  // namespace fastrl
