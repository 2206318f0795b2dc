// Which instantiation runs.
#include "selected/launch.h"
#include "selected/launch_handed_sm90.cuh"
#include "selected/launch_keys_sm90.cuh"
#include "selected/launch_query_sm90.cuh"
#include "selected/launch_sm80.cuh"
#include "selected/launch_sm90.cuh"

namespace nsa {

// Compiled in instantiations/.
extern template void launch_selected_forward_sm80<Half, 64, 64>(const SelectedForwardParams&, cudaStream_t);
extern template void launch_selected_forward_sm80<Half, 128, 128>(const SelectedForwardParams&, cudaStream_t);
extern template void launch_selected_forward_sm80<Half, 192, 128>(const SelectedForwardParams&, cudaStream_t);
extern template void launch_selected_forward_sm80<Half, 256, 256>(const SelectedForwardParams&, cudaStream_t);
extern template void launch_selected_forward_sm80<BFloat16, 64, 64>(const SelectedForwardParams&, cudaStream_t);
extern template void launch_selected_forward_sm80<BFloat16, 128, 128>(const SelectedForwardParams&, cudaStream_t);
extern template void launch_selected_forward_sm80<BFloat16, 192, 128>(const SelectedForwardParams&, cudaStream_t);
extern template void launch_selected_forward_sm80<BFloat16, 256, 256>(const SelectedForwardParams&, cudaStream_t);
extern template void launch_selected_backward_query_sm80<Half, 64, 64>(const SelectedBackwardParams&, cudaStream_t);
extern template void launch_selected_backward_query_sm80<Half, 128, 128>(const SelectedBackwardParams&, cudaStream_t);
extern template void launch_selected_backward_query_sm80<Half, 192, 128>(const SelectedBackwardParams&, cudaStream_t);
extern template void launch_selected_backward_query_sm80<Half, 256, 256>(const SelectedBackwardParams&, cudaStream_t);
extern template void launch_selected_backward_query_sm80<BFloat16, 64, 64>(const SelectedBackwardParams&, cudaStream_t);
extern template void launch_selected_backward_query_sm80<BFloat16, 128, 128>(const SelectedBackwardParams&,
                                                                             cudaStream_t);
extern template void launch_selected_backward_query_sm80<BFloat16, 192, 128>(const SelectedBackwardParams&,
                                                                             cudaStream_t);
extern template void launch_selected_backward_query_sm80<BFloat16, 256, 256>(const SelectedBackwardParams&,
                                                                             cudaStream_t);
extern template void launch_selected_backward_keys_sm80<Half, 64, 64>(const SelectedBackwardParams&, cudaStream_t);
extern template void launch_selected_backward_keys_sm80<Half, 128, 128>(const SelectedBackwardParams&, cudaStream_t);
extern template void launch_selected_backward_keys_sm80<Half, 192, 128>(const SelectedBackwardParams&, cudaStream_t);
extern template void launch_selected_backward_keys_sm80<Half, 256, 256>(const SelectedBackwardParams&, cudaStream_t);
extern template void launch_selected_backward_keys_sm80<BFloat16, 64, 64>(const SelectedBackwardParams&, cudaStream_t);
extern template void launch_selected_backward_keys_sm80<BFloat16, 128, 128>(const SelectedBackwardParams&,
                                                                            cudaStream_t);
extern template void launch_selected_backward_keys_sm80<BFloat16, 192, 128>(const SelectedBackwardParams&,
                                                                            cudaStream_t);
extern template void launch_selected_backward_keys_sm80<BFloat16, 256, 256>(const SelectedBackwardParams&,
                                                                            cudaStream_t);
extern template bool try_selected_forward_sm90<Half, 64, 64>(const SelectedForwardParams&, cudaStream_t);
extern template bool try_selected_forward_sm90<Half, 128, 128>(const SelectedForwardParams&, cudaStream_t);
extern template bool try_selected_forward_sm90<Half, 192, 128>(const SelectedForwardParams&, cudaStream_t);
extern template bool try_selected_forward_sm90<BFloat16, 64, 64>(const SelectedForwardParams&, cudaStream_t);
extern template bool try_selected_forward_sm90<BFloat16, 128, 128>(const SelectedForwardParams&, cudaStream_t);
extern template bool try_selected_forward_sm90<BFloat16, 192, 128>(const SelectedForwardParams&, cudaStream_t);
extern template void launch_selected_backward_keys_sm90<Half, 64, 64>(const SelectedBackwardParams&, cudaStream_t);
extern template void launch_selected_backward_keys_sm90<Half, 128, 128>(const SelectedBackwardParams&, cudaStream_t);
extern template void launch_selected_backward_keys_sm90<Half, 192, 128>(const SelectedBackwardParams&, cudaStream_t);
extern template void launch_selected_backward_keys_sm90<BFloat16, 64, 64>(const SelectedBackwardParams&, cudaStream_t);
extern template void launch_selected_backward_keys_sm90<BFloat16, 128, 128>(const SelectedBackwardParams&,
                                                                            cudaStream_t);
extern template void launch_selected_backward_keys_sm90<BFloat16, 192, 128>(const SelectedBackwardParams&,
                                                                            cudaStream_t);
extern template bool try_selected_backward_query_sm90<Half, 64, 64>(const SelectedBackwardParams&, cudaStream_t);
extern template bool try_selected_backward_query_sm90<Half, 128, 128>(const SelectedBackwardParams&, cudaStream_t);
extern template bool try_selected_backward_query_sm90<Half, 192, 128>(const SelectedBackwardParams&, cudaStream_t);
extern template bool try_selected_backward_query_sm90<BFloat16, 64, 64>(const SelectedBackwardParams&, cudaStream_t);
extern template bool try_selected_backward_query_sm90<BFloat16, 128, 128>(const SelectedBackwardParams&, cudaStream_t);
extern template bool try_selected_backward_query_sm90<BFloat16, 192, 128>(const SelectedBackwardParams&, cudaStream_t);
extern template SelectedBackwardPlan selected_backward_plan_sm90<Half, 64, 64>(const SelectedBackwardParams&);
extern template SelectedBackwardPlan selected_backward_plan_sm90<Half, 128, 128>(const SelectedBackwardParams&);
extern template SelectedBackwardPlan selected_backward_plan_sm90<Half, 192, 128>(const SelectedBackwardParams&);
extern template SelectedBackwardPlan selected_backward_plan_sm90<BFloat16, 64, 64>(const SelectedBackwardParams&);
extern template SelectedBackwardPlan selected_backward_plan_sm90<BFloat16, 128, 128>(const SelectedBackwardParams&);
extern template SelectedBackwardPlan selected_backward_plan_sm90<BFloat16, 192, 128>(const SelectedBackwardParams&);
extern template void launch_selected_backward_handed_sm90<Half, 64, 64>(const SelectedBackwardParams&, cudaStream_t);
extern template void launch_selected_backward_handed_sm90<Half, 128, 128>(const SelectedBackwardParams&, cudaStream_t);
extern template void launch_selected_backward_handed_sm90<Half, 192, 128>(const SelectedBackwardParams&, cudaStream_t);
extern template void launch_selected_backward_handed_sm90<BFloat16, 64, 64>(const SelectedBackwardParams&,
                                                                            cudaStream_t);
extern template void launch_selected_backward_handed_sm90<BFloat16, 128, 128>(const SelectedBackwardParams&,
                                                                              cudaStream_t);
extern template void launch_selected_backward_handed_sm90<BFloat16, 192, 128>(const SelectedBackwardParams&,
                                                                              cudaStream_t);

namespace {

template <typename Element, int kDimK, int kDimV>
void launch_selected_forward_of(const SelectedForwardParams& params, cudaStream_t stream) {
  if constexpr (kDimK <= 192) {
    if (try_selected_forward_sm90<Element, kDimK, kDimV>(params, stream)) {
      return;
    }
  }
  launch_selected_forward_sm80<Element, kDimK, kDimV>(params, stream);
}

template <typename Element, int kDimK, int kDimV>
void launch_selected_backward_keys_of(const SelectedBackwardParams& params, cudaStream_t stream) {
  if constexpr (kDimK <= 192) {
    if (params.keys_heads > 0) {
      launch_selected_backward_keys_sm90<Element, kDimK, kDimV>(params, stream);
      return;
    }
  }
  launch_selected_backward_keys_sm80<Element, kDimK, kDimV>(params, stream);
}

template <typename Element, int kDimK, int kDimV>
void launch_selected_backward_query_of(const SelectedBackwardParams& params, cudaStream_t stream) {
  if constexpr (kDimK <= 192) {
    if (try_selected_backward_query_sm90<Element, kDimK, kDimV>(params, stream)) {
      return;
    }
  }
  launch_selected_backward_query_sm80<Element, kDimK, kDimV>(params, stream);
}

template <typename Element, int kDimK, int kDimV>
void launch_selected_backward_of(const SelectedBackwardParams& params, cudaStream_t stream) {
  if constexpr (kDimK <= 192) {
    if (params.handed.data != nullptr) {
      launch_selected_backward_handed_sm90<Element, kDimK, kDimV>(params, stream);
      return;
    }
  }
  launch_selected_backward_query_of<Element, kDimK, kDimV>(params, stream);
  launch_selected_backward_keys_of<Element, kDimK, kDimV>(params, stream);
}

}  // namespace

void launch_selected_forward(const SelectedForwardParams& params, ElementType type, cudaStream_t stream) {
  with_tile_dims(params.q.width, params.v.width, [&](auto k, auto v) {
    if (type == ElementType::kFloat16) {
      launch_selected_forward_of<Half, k, v>(params, stream);
    } else {
      launch_selected_forward_of<BFloat16, k, v>(params, stream);
    }
  });
}

void launch_selected_backward(const SelectedBackwardParams& params, ElementType type, cudaStream_t stream) {
  with_tile_dims(params.q.width, params.v.width, [&](auto k, auto v) {
    if (type == ElementType::kFloat16) {
      launch_selected_backward_of<Half, k, v>(params, stream);
    } else {
      launch_selected_backward_of<BFloat16, k, v>(params, stream);
    }
  });
}

SelectedBackwardPlan selected_backward_plan(const SelectedBackwardParams& params, ElementType type) {
  SelectedBackwardPlan result{};
  with_tile_dims(params.q.width, params.v.width, [&](auto k, auto v) {
    if constexpr (k <= 192) {
      result = type == ElementType::kFloat16 ? selected_backward_plan_sm90<Half, k, v>(params)
                                             : selected_backward_plan_sm90<BFloat16, k, v>(params);
    }
  });
  return result;
}

int64_t selected_partial_floats(const SelectedBackwardParams& params) {
  if (params.keys_heads > 0) {
    return params.keys_heads * selected_head_sums(params);
  }
  const ChosenBy& chosen_by = params.chosen_by;
  // Only blocks of more than one segment have partial sums: fewer than twice the full segments of all pairs.
  const int64_t tiles = ceil_div(params.select_size, kKeysPerGradientTile);
  return 2 * chosen_by.full_segments * tiles * kKeysPerGradientTile * tile_row_size(params.q.width, params.v.width);
}

}  // namespace nsa
