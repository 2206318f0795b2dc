#include "selected/sm80/launch.cuh"

namespace nsa {
template struct SelectedSm80<BFloat16, 128, 128>;
}  // namespace nsa
