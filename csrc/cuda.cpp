// The ops of csrc/scan.cpp and csrc/group.cpp for CUDA tensors: checks, memory, the launchers of cuda_launchers.h.
// setup.py compiles this file where nvcc is and torch has CUDA.
#include "cuda_launchers.h"
#include "fastrl.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

namespace fastrl {
namespace {

void check_vector_on(const Tensor& x, const Tensor& like, int64_t n, ScalarType type, const char* name) {
  STD_TORCH_CHECK(x.is_cuda() && x.get_device_index() == like.get_device_index() && x.dim() == 1 && x.size(0) == n &&
                      x.is_contiguous() && x.scalar_type() == type,
                  name, " must be a contiguous vector of length ", n, " on the first argument's GPU, of its type");
}

ScalarType float_type(const Tensor& x) {
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, "must be float32 or float64");
  check_vector_on(x, x, x.numel(), type, "the first argument");
  return type;
}

// The borders' numbers are not read: that would stall the GPU.
int64_t sequences_of(const Tensor& cu_seqlens, const Tensor& like) {
  STD_TORCH_CHECK(cu_seqlens.numel() >= 1, "cu_seqlens must be [S + 1]");
  check_vector_on(cu_seqlens, like, cu_seqlens.numel(), ScalarType::Long, "cu_seqlens");
  return cu_seqlens.numel() - 1;
}

cudaStream_t stream_of(const Tensor& x) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

void check_launch(cudaError_t error) { STD_TORCH_CHECK(error == cudaSuccess, cudaGetErrorString(error)); }

Tensor reverse_scan(const Tensor& x, const Tensor& decay, const Tensor& cu_seqlens) {
  const ScalarType type = float_type(x);
  check_vector_on(decay, x, x.numel(), type, "decay");
  const int64_t sequences = sequences_of(cu_seqlens, x);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor y = torch::stable::empty_like(x);
  check_launch(fastrl_reverse_scan(x.const_data_ptr(), decay.const_data_ptr(), cu_seqlens.const_data_ptr<int64_t>(),
                                   sequences, type == ScalarType::Double, y.mutable_data_ptr(), stream_of(x)));
  return y;
}

std::tuple<Tensor, Tensor> gae(const Tensor& reward, const Tensor& value, const Tensor& cu_seqlens,
                               const Tensor& trained, double gamma, double lam, bool skip_observations) {
  const ScalarType type = float_type(reward);
  check_vector_on(value, reward, reward.numel(), type, "value");
  check_vector_on(trained, reward, reward.numel(), ScalarType::Bool, "trained");
  const int64_t sequences = sequences_of(cu_seqlens, reward);
  const torch::stable::accelerator::DeviceGuard guard(reward.get_device_index());
  Tensor advantage = torch::stable::empty_like(reward), returns = torch::stable::empty_like(reward);
  check_launch(fastrl_gae(reward.const_data_ptr(), value.const_data_ptr(), cu_seqlens.const_data_ptr<int64_t>(),
                          trained.const_data_ptr<bool>(), sequences, gamma, lam, skip_observations,
                          type == ScalarType::Double, advantage.mutable_data_ptr(), returns.mutable_data_ptr(),
                          stream_of(reward)));
  return {advantage, returns};
}

Tensor group_advantage(const Tensor& reward, const Tensor& group, int64_t baseline, int64_t scale, int64_t ddof,
                       double eps) {
  const ScalarType type = float_type(reward);
  const int64_t rollouts = reward.numel();
  check_vector_on(group, reward, rollouts, ScalarType::Long, "group");
  const torch::stable::accelerator::DeviceGuard guard(reward.get_device_index());
  Tensor advantage = torch::stable::empty_like(reward);
  const auto bytes = static_cast<int64_t>(fastrl_group_advantage_workspace(rollouts));
  Tensor workspace = torch::stable::new_empty(group, {(bytes + 7) / 8});
  check_launch(fastrl_group_advantage(reward.const_data_ptr(), group.const_data_ptr<int64_t>(), rollouts, baseline,
                                      scale, ddof, eps, type == ScalarType::Double, advantage.mutable_data_ptr(),
                                      workspace.mutable_data_ptr(), stream_of(reward)));
  return advantage;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastrl, CUDA, library) {
  library.impl("reverse_scan", TORCH_BOX(&reverse_scan));
  library.impl("gae", TORCH_BOX(&gae));
  library.impl("group_advantage", TORCH_BOX(&group_advantage));
}

}  // namespace fastrl
