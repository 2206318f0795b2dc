#include "selected/sm80/launch.cuh"

namespace nsa {
template struct SelectedSm80<Half, 256, 256>;
}  // namespace nsa
