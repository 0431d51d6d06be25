// What the CUDA sources offer: pointers to device memory, sizes, a stream. The arguments come in the order of the ops
// of csrc/scan.cpp and csrc/group.cpp; is_double says whether void pointers are f64 or f32.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

// x, decay, y [T]; cu_seqlens [S + 1] rises from 0 to T.
cudaError_t fastrl_reverse_scan(const void* x, const void* decay, const int64_t* cu_seqlens, int64_t sequences,
                                bool is_double, void* y, cudaStream_t stream);

// reward, value, trained, advantage, returns [T]; cu_seqlens [S + 1].
cudaError_t fastrl_gae(const void* reward, const void* value, const int64_t* cu_seqlens, const bool* trained,
                       int64_t sequences, double gamma, double lam, bool skip_observations, bool is_double,
                       void* advantage, void* returns, cudaStream_t stream);

// reward, group, advantage [S]; baseline and scale as in csrc/group.cpp. workspace: that many bytes, any contents.
size_t fastrl_group_advantage_workspace(int64_t rollouts);
cudaError_t fastrl_group_advantage(const void* reward, const int64_t* group, int64_t rollouts, int64_t baseline,
                                   int64_t scale, int64_t ddof, double eps, bool is_double, void* advantage,
                                   void* workspace, cudaStream_t stream);
