#include "decode/sm90/launch.cuh"

namespace nsa {
template struct DecodeSm90<BFloat16, 192, 128>;
}  // namespace nsa
