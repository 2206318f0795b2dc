#include "decode/sm80/launch.cuh"

namespace nsa {
template struct DecodeSm80<Half, 128, 128>;
}  // namespace nsa
