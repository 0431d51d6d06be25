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

constexpr int64_t kLanes = 16;  // one register of AVX-512, two of AVX2, four of SSE2 and NEON
typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t Places __attribute__((vector_size(kLanes * sizeof(int32_t))));

// By reference: a vector returned by value would have another calling convention for each width.
FASTRL_INLINE void load(Lanes& lanes, const float* x) { std::memcpy(&lanes, x, sizeof(Lanes)); }
FASTRL_INLINE void store(float* x, const Lanes& lanes) { std::memcpy(x, &lanes, sizeof(Lanes)); }

// By halves, which takes four additions one after another instead of sixteen.
FASTRL_INLINE float total(const Lanes& lanes) {
  typedef float Half __attribute__((vector_size(8 * sizeof(float))));
  typedef float Quarter __attribute__((vector_size(4 * sizeof(float))));
  Half half[2];
  std::memcpy(half, &lanes, sizeof(Lanes));
  half[0] += half[1];
  Quarter quarter[2];
  std::memcpy(quarter, half, sizeof(Half));
  quarter[0] += quarter[1];
  return (quarter[0][0] + quarter[0][2]) + (quarter[0][1] + quarter[0][3]);
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

FASTRL_INLINE void exponential(Lanes& lanes) {
  float x[kLanes];
  store(x, lanes);
#pragma omp simd
  for (int64_t i = 0; i < kLanes; ++i) x[i] = exponential(x[i]);
  load(lanes, x);
}

FASTRL_INLINE int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

FASTRL_INLINE void copy_row(const float* x, int64_t d, float* y) {
  int64_t i = 0;
  for (Lanes lanes; i + kLanes <= d; i += kLanes) {
    load(lanes, x + i);
    store(y + i, lanes);
  }
  for (; i < d; ++i) y[i] = x[i];
}

// The scores of one query, in whole registers: those past place t are told apart by their place.
struct Row {
  float* p;
  int64_t t, tiles;

  // Puts `other` in the lanes from place s on that lie past t.
  FASTRL_INLINE void only_seen(Lanes& x, int64_t s, const Lanes& other) const {
    constexpr Places counted = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    x = counted <= static_cast<int32_t>(t - s) ? x : other;
  }

  FASTRL_INLINE float top() const {
    Lanes best = Lanes{} - INFINITY, x;
    for (int64_t s = 0; s < tiles; s += kLanes) {
      load(x, p + s);
      only_seen(x, s, best);
      best = x > best ? x : best;
    }
    float result = best[0];
    for (int64_t i = 1; i < kLanes; ++i) result = best[i] > result ? best[i] : result;
    return result;
  }

  // Replaces the scores by exp(score * scale - shift), and by 0 past t; returns the sum.
  FASTRL_INLINE float exponentials(float scale, float shift) const {
    Lanes sum = {}, x;
    for (int64_t s = 0; s < tiles; s += kLanes) {
      load(x, p + s);
      x = x * scale - shift;
      exponential(x);
      only_seen(x, s, Lanes{});
      store(p + s, x);
      sum += x;
    }
    return total(sum);
  }

  FASTRL_INLINE void scale(float factor) const {
    for (int64_t s = 0; s < tiles; s += kLanes) {
      Lanes x;
      load(x, p + s);
      store(p + s, x * factor);
    }
  }
};

}  // namespace fastrl
