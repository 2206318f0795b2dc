#include "host/cpu/vector.h"

#include <cmath>
#include <cstring>
#include <limits>

// Several versions of one function, picked by the loader through an ifunc. Sanitizers' runtimes are not up yet when
// ifuncs resolve, so instrumented builds have one version.
#if defined(__x86_64__) && defined(__GNUC__) && __GNUC__ >= 12 && !defined(__clang__) && defined(__linux__) && \
    !defined(__SANITIZE_ADDRESS__)
#define NSA_VECTORIZED __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define NSA_VECTORIZED
#endif

namespace nsa::cpu {
namespace {

// e^x without a branch, so that the compiler makes vectors of it: x = k ln 2 + r with |r| <= ln 2 / 2, and a polynomial
// of degree 6 in r. Weights under e^-87 are 0; e^88 stands for all above, which only a wrong lse can ask for.
inline __attribute__((always_inline)) float exp_fast(float x) {
  constexpr float kLog2E = 1.44269504088896341F;
  constexpr float kLn2High = 0.693359375F;
  constexpr float kLn2Low = -2.12194440e-4F;
  constexpr float kRound = 12582912.0F;  // 1.5 * 2^23: adding it rounds to an integer in the low mantissa bits
  const float clamped = x < -87.0F ? -87.0F : (x > 88.0F ? 88.0F : x);
  const float shifted = clamped * kLog2E + kRound;
  const float k = shifted - kRound;
  float r = clamped - k * kLn2High;
  r -= k * kLn2Low;
  float p = 1.9875691500e-4F;
  p = p * r + 1.3981999507e-3F;
  p = p * r + 8.3334519073e-3F;
  p = p * r + 4.1665795894e-2F;
  p = p * r + 1.6666665459e-1F;
  p = p * r + 5.0000001201e-1F;
  p = p * r * r + r + 1.0F;
  int32_t bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  const int32_t exponent = static_cast<int32_t>(static_cast<uint32_t>(bits) << 23) + (127 << 23);
  float power;
  std::memcpy(&power, &exponent, sizeof(power));
  return x < -87.0F ? 0.0F : p * power;
}

inline double exp_fast(double x) { return std::exp(x); }

template <typename T>
inline __attribute__((always_inline)) T max_loop(const T* x, int64_t n) {
  T best = -INFINITY;
#pragma omp simd reduction(max : best)
  for (int64_t i = 0; i < n; ++i) {
    best = x[i] > best ? x[i] : best;
  }
  return best;
}

template <typename T>
inline __attribute__((always_inline)) T exp_loop(T* x, int64_t n, T shift) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    const T value = exp_fast(x[i] - shift);
    x[i] = value;
    sum += value;
  }
  return sum;
}

template <typename T>
inline __attribute__((always_inline)) void scale_loop(T* x, int64_t n, T factor) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    x[i] *= factor;
  }
}

template <typename T>
inline __attribute__((always_inline)) void scale_add_loop(T* y, const T* x, int64_t n, T factor) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    y[i] = y[i] * factor + x[i];
  }
}

template <typename T>
inline __attribute__((always_inline)) void add_loop(T* y, const T* x, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    y[i] += x[i];
  }
}

template <typename T>
inline __attribute__((always_inline)) T dot_loop(const T* x, const T* y, int64_t n) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    sum += x[i] * y[i];
  }
  return sum;
}

template <typename T>
inline __attribute__((always_inline)) void softmax_backward_loop(T* dp, const T* p, int64_t n, T delta, T grad_lse) {
  constexpr T kWhole = 1 - 2 * std::numeric_limits<T>::epsilon();
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    dp[i] = p[i] > kWhole ? grad_lse : p[i] * (dp[i] - delta);
  }
}

}  // namespace

NSA_VECTORIZED float row_max(const float* x, int64_t n) { return max_loop(x, n); }
double row_max(const double* x, int64_t n) { return max_loop(x, n); }

NSA_VECTORIZED float row_exp(float* x, int64_t n, float shift) { return exp_loop(x, n, shift); }
double row_exp(double* x, int64_t n, double shift) { return exp_loop(x, n, shift); }

NSA_VECTORIZED void row_scale(float* x, int64_t n, float factor) { scale_loop(x, n, factor); }
void row_scale(double* x, int64_t n, double factor) { scale_loop(x, n, factor); }

NSA_VECTORIZED void row_scale_add(float* y, const float* x, int64_t n, float factor) {
  scale_add_loop(y, x, n, factor);
}
void row_scale_add(double* y, const double* x, int64_t n, double factor) { scale_add_loop(y, x, n, factor); }

NSA_VECTORIZED void row_add(float* y, const float* x, int64_t n) { add_loop(y, x, n); }
void row_add(double* y, const double* x, int64_t n) { add_loop(y, x, n); }

NSA_VECTORIZED float row_dot(const float* x, const float* y, int64_t n) { return dot_loop(x, y, n); }
double row_dot(const double* x, const double* y, int64_t n) { return dot_loop(x, y, n); }

NSA_VECTORIZED void row_softmax_backward(float* dp, const float* p, int64_t n, float delta, float grad_lse) {
  softmax_backward_loop(dp, p, n, delta, grad_lse);
}
void row_softmax_backward(double* dp, const double* p, int64_t n, double delta, double grad_lse) {
  softmax_backward_loop(dp, p, n, delta, grad_lse);
}

}  // namespace nsa::cpu
