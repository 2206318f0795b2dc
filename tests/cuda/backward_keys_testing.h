// What tests of the gradients of k and v share. Included after what they test.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/launch.cuh"
#include "common/matrix.cuh"

namespace nsa {

template <typename T>
struct Device {
  T* data = nullptr;
  int64_t size = 0;
  explicit Device(int64_t n) : size(n) { check_cuda(cudaMalloc(&data, std::max<int64_t>(n, 1) * sizeof(T)), "malloc"); }
  Device(const Device&) = delete;
  ~Device() { cudaFree(data); }
  void set(const std::vector<T>& from) {
    check_cuda(cudaMemcpy(data, from.data(), from.size() * sizeof(T), cudaMemcpyHostToDevice), "copy");
  }
  std::vector<T> get() const {
    std::vector<T> to(size);
    check_cuda(cudaMemcpy(to.data(), data, size * sizeof(T), cudaMemcpyDeviceToHost), "copy");
    return to;
  }
};

// About normal: the sum of four uniform numbers.
template <typename T>
__global__ void fill_normal(T* to, int64_t count, uint64_t seed, float mean, float deviation) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < count; i += int64_t{gridDim.x} * blockDim.x) {
    uint64_t x = (i + seed * 0x9e3779b97f4a7c15ull) * 0xbf58476d1ce4e5b9ull;
    x ^= x >> 31;
    x *= 0x94d049bb133111ebull;
    x ^= x >> 29;
    float sum = 0.f;
    for (int j = 0; j < 4; ++j) {
      sum += static_cast<float>((x >> (16 * j)) & 0xffff) / 65536.f - 0.5f;
    }
    to[i] = from_float<T>(mean + deviation * sum * 1.7320508f);
  }
}

template <typename T>
__global__ void fill_value(T* to, int64_t count, float value) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < count; i += int64_t{gridDim.x} * blockDim.x) {
    to[i] = from_float<T>(value);
  }
}

constexpr int kWarps = 4;

template <typename Element>
__device__ float dot(const Element* a, const Element* b, int width, int lane) {
  float sum = 0.f;
  for (int i = lane; i < width; i += 32) {
    sum += to_float(a[i]) * to_float(b[i]);
  }
  for (int bit = 16; bit > 0; bit /= 2) {
    sum += __shfl_xor_sync(0xffffffffu, sum, bit);
  }
  return sum;
}

// Squares of errors and of gradients.
struct Sums {
  double error_k, norm_k, error_v, norm_v;
};

// Adds up the gradients of a key that kWarps warps hold parts of, a lane every 32nd column, and notes the errors of
// what a kernel made of them.
template <typename Element>
__device__ void add_errors(const float (&grad_k)[6], const float (&grad_v)[6], float scale, const Element* got_k,
                           int width_k, const Element* got_v, int width_v, Sums* sums) {
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  __shared__ float of_warps[kWarps][2][192];
  for (int i = 0; i < 6; ++i) {
    of_warps[warp][0][lane + 32 * i] = grad_k[i];
    of_warps[warp][1][lane + 32 * i] = grad_v[i];
  }
  __syncthreads();
  if (warp >= 2) {
    return;
  }
  const Element* got = warp == 0 ? got_k : got_v;
  const int width = warp == 0 ? width_k : width_v;
  double error = 0;
  double norm = 0;
  for (int i = 0; i < 6; ++i) {
    const int column = lane + 32 * i;
    if (column < width) {
      float wanted = 0.f;
      for (int w = 0; w < kWarps; ++w) {
        wanted += of_warps[w][warp][column];
      }
      wanted *= warp == 0 ? scale : 1.f;
      const double difference = to_float(got[column]) - wanted;
      error += difference * difference;
      norm += double{wanted} * wanted;
    }
  }
  atomicAdd(warp == 0 ? &sums->error_k : &sums->error_v, error);
  atomicAdd(warp == 0 ? &sums->norm_k : &sums->norm_v, norm);
}

}  // namespace nsa
