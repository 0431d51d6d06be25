// Vectors for the float32 loops of layers and attention: one version of a function per width, chosen when loaded.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

// A plain loop marked so is compiled for SSE2, AVX2 and AVX-512; elsewhere for the compiler's own target.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define FASTRL_VECTORS __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define FASTRL_VECTORS
#endif
#define FASTRL_INLINE inline __attribute__((always_inline))  // into each version of its caller

namespace fastrl {

// Loops over this many numbers have a constant length and no remainder: one register of AVX-512, two of AVX2, four of
// SSE2 and NEON. They are plain arrays because gcc keeps a vector type wider than the machine's in memory.
constexpr int64_t kLanes = 16;

FASTRL_INLINE int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// By halves, which takes four additions one after another instead of sixteen.
FASTRL_INLINE float total(const float* lanes) {
  float half[8], quarter[4];
  for (int i = 0; i < 8; ++i) half[i] = lanes[i] + lanes[i + 8];
  for (int i = 0; i < 4; ++i) quarter[i] = half[i] + half[i + 4];
  return (quarter[0] + quarter[2]) + (quarter[1] + quarter[3]);
}

// Within 1.5 units in the last place on [-87, 88], clamped outside; NaN stays NaN. Cody and Waite's reduction,
// exp(x) = 2^n exp(x - n log 2), and the polynomial of Cephes (Moshier 1989, expf).
FASTRL_INLINE float exponential(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  const float shifted = x * 1.44269504088896341f + 12582912.0f;  // 1.5 * 2^23: the sum's last bits are the integer n
  const float n = shifted - 12582912.0f;
  const float f = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  p = p * f * f + f + 1.0f;
  const int32_t exponent = static_cast<int32_t>(std::bit_cast<uint32_t>(shifted) - 0x4B400000u + 127u) << 23;
  return p * std::bit_cast<float>(exponent);
}

// The scores of one query, in whole registers: those past place t are told apart by their place.
struct Row {
  float* p;
  int64_t t, tiles;

  FASTRL_INLINE float top() const {
    float best[kLanes];
    for (int32_t i = 0; i < kLanes; ++i) best[i] = -INFINITY;
    for (int64_t s = 0; s < tiles; s += kLanes) {
      const float* x = p + s;
      const int32_t last = static_cast<int32_t>(t - s);
#pragma omp simd
      for (int32_t i = 0; i < kLanes; ++i) best[i] = i <= last && x[i] > best[i] ? x[i] : best[i];
    }
    float result = best[0];
    for (int32_t i = 1; i < kLanes; ++i) result = best[i] > result ? best[i] : result;
    return result;
  }

  // Replaces the scores by exp(score * scale - shift), and by 0 past t; returns the sum.
  FASTRL_INLINE float exponentials(float scale, float shift) const {
    float sum[kLanes] = {};
    for (int64_t s = 0; s < tiles; s += kLanes) {
      float* x = p + s;
      const int32_t last = static_cast<int32_t>(t - s);
#pragma omp simd
      for (int32_t i = 0; i < kLanes; ++i) {
        const float e = exponential(x[i] * scale - shift);
        x[i] = i <= last ? e : 0.0f;
        sum[i] += x[i];
      }
    }
    return total(sum);
  }

  FASTRL_INLINE void scale(float factor) const {
    for (int64_t s = 0; s < tiles; s += kLanes) {
      float* x = p + s;
#pragma omp simd
      for (int32_t i = 0; i < kLanes; ++i) x[i] *= factor;
    }
  }
};

}  // namespace fastrl
