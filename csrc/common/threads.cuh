// Which thread this is. Parts of a kernel call these rather than be told: the compiler then knows that lanes differ,
// and doesn't write a loop twice, once for either outcome of a test of the lane.
#pragma once

namespace nsa {

__device__ inline int this_warp() { return static_cast<int>(threadIdx.x) / 32; }
__device__ inline int this_lane() { return static_cast<int>(threadIdx.x) % 32; }

}  // namespace nsa
