#include "decode/sm90/launch.cuh"

namespace nsa {
template struct DecodeSm90<Half, 128, 128>;
}  // namespace nsa
