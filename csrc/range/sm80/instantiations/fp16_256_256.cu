#include "range/sm80/launch.cuh"

namespace nsa {
template struct RangeSm80<Half, 256, 256>;
}  // namespace nsa
