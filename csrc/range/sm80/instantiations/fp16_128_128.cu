#include "range/sm80/launch.cuh"

namespace nsa {
template struct RangeSm80<Half, 128, 128>;
}  // namespace nsa
