#include "selected/sm80/launch.cuh"

namespace nsa {
template struct SelectedSm80<Half, 64, 64>;
}  // namespace nsa
