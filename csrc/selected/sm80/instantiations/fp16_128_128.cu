#include "selected/sm80/launch.cuh"

namespace nsa {
template struct SelectedSm80<Half, 128, 128>;
}  // namespace nsa
