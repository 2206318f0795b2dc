#include "decode/sm80/launch.cuh"

namespace nsa {
template struct DecodeSm80<Half, 256, 256>;
}  // namespace nsa
