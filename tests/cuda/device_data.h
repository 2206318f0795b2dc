// Memory of the GPU, and numbers to fill it with, for the tests of kernels.
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

struct Random {
  uint64_t state;
  uint32_t operator()() {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    return static_cast<uint32_t>(state >> 32) ^ static_cast<uint32_t>(state >> 61);
  }
  uint32_t below(uint32_t n) { return static_cast<uint32_t>((uint64_t{(*this)()} * n) >> 32); }
  bool chance(float p) { return (*this)() < p * 4294967296.0; }
};

// About normal: the sum of four uniform numbers.
template <typename T>
__global__ void fill_normal(T* to, int64_t count, uint64_t seed, float mean = 0.f, float deviation = 1.f) {
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

}  // namespace nsa
