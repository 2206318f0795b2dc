#include "decode/sm90/launch.cuh"

namespace nsa {
template struct DecodeSm90<Half, 64, 64>;
}  // namespace nsa
