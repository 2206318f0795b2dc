#include "range/sm80/launch.cuh"

namespace nsa {
template struct RangeSm80<Half, 192, 128>;
}  // namespace nsa
