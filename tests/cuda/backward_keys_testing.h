// What tests of the gradients of k and v share. Included after what they test.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/launch.cuh"
#include "common/matrix.cuh"
#include "device_data.h"

namespace nsa {

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
