#include "decode/sm80/launch.cuh"

namespace nsa {
template struct DecodeSm80<BFloat16, 192, 128>;
}  // namespace nsa
