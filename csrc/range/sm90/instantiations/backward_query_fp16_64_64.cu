#include "range/sm90/launch_backward_query.cuh"

namespace nsa {
template void launch_range_backward_query_sm90<Half, 64, 64>(const RangeBackwardParams&, cudaStream_t);
}  // namespace nsa
