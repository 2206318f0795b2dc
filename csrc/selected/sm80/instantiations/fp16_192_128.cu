#include "selected/sm80/launch.cuh"

namespace nsa {
template struct SelectedSm80<Half, 192, 128>;
}  // namespace nsa
