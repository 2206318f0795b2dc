#include "range/sm80/launch.cuh"

namespace nsa {
template struct RangeSm80<BFloat16, 192, 128>;
}  // namespace nsa
