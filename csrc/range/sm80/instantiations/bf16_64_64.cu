#include "range/sm80/launch.cuh"

namespace nsa {
template struct RangeSm80<BFloat16, 64, 64>;
}  // namespace nsa
