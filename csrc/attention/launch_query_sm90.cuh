// Launch of Hopper's kernel for the gradient of q: which calls it takes, and the tile sizes it runs with.
#pragma once

#include <type_traits>

#include "attention/backward_query_sm90.cuh"
#include "common/launch_sm90.cuh"

namespace nsa {

// Whether these tensors suit the kernel; others run on the sm_80 kernel. A group that leaves a quarter of the 64 rows
// of a warpgroup empty is not worth it.
inline bool range_backward_query_fits_sm90(const RangeBackwardParams& params) {
  const Sequences& s = params.sequences;
  const int64_t batch = s.packed() ? 1 : s.batch;
  const int64_t heads = int64_t{s.heads_kv} * s.group;
  return s.group <= 64 && 64 / s.group * s.group >= 48 && params.q.width <= 192 && params.v.width <= 128 &&
         params.num_keys > 0 && copies_by_map(params.q, batch, s.length_q, heads) &&
         copies_by_map(params.grad_out, batch, s.length_q, heads) &&
         copies_by_map(params.k, batch, params.num_keys, s.heads_kv) &&
         copies_by_map(params.v, batch, params.num_keys, s.heads_kv);
}

template <typename Shape>
void launch_range_backward_query_shape(const RangeBackwardParams& range, cudaStream_t stream) {
  constexpr const char* kName = "gradient of q over a range";
  constexpr ElementType kType = kElementType<typename Shape::Element>;
  const Sequences& s = range.sequences;
  const int32_t rows = 64 / s.group * s.group;
  const int64_t tile_rows = int64_t{Shape::kConsumers} * rows;
  const int64_t slots = count_slots(s, s.length_q * s.group, tile_rows);
  const int64_t tiles = slots * s.heads_kv;
  if (tiles > 0x3fffffff) {
    throw std::runtime_error(std::string("nsa_torch: ") + kName + ": too many tiles for one launch");
  }
  const int64_t batch = s.packed() ? 1 : s.batch;
  const auto group = static_cast<uint32_t>(s.group);
  const auto map_of_rows = [&](const TensorView& x) {
    return tensor_map(x, kType, batch, s.length_q, s.heads_kv * s.group, group, 64 / group, kName);
  };
  const auto map_of_keys = [&](const TensorView& x) {
    return tensor_map(x, kType, batch, range.num_keys, s.heads_kv, 1, Shape::kKeys, kName);
  };
  const RangeBackwardQuerySm90Params params{
      .range = range,
      .tiles = static_cast<int32_t>(tiles),
      .slots = static_cast<int32_t>(slots),
      .by_heads = Divisor(static_cast<uint32_t>(s.heads_kv)),
      .by_slots = Divisor(static_cast<uint32_t>(ceil_div(s.length_q * s.group, tile_rows))),
      .by_rows = Divisor(static_cast<uint32_t>(tile_rows)),
      .consumer_rows = rows,
      .consumer_bytes = rows * (Shape::kDimK + Shape::kDimV) * static_cast<int32_t>(sizeof(typename Shape::Element)),
      .q = map_of_rows(range.q),
      .grad_out = map_of_rows(range.grad_out),
      .k = map_of_keys(range.k),
      .v = map_of_keys(range.v)};
  launch(range_backward_query_sm90<Shape>, min_of(tiles, multiprocessors(kName)), Shape::kThreads,
         sizeof(typename Shape::Shared), stream, kName, params);
}

// Three warpgroups where their registers hold the sums: docs/hopper_query_gradient.md.
template <typename Element, int kDimK, int kDimV>
using GradQuerySm90ShapeFor = std::conditional_t<
    (kDimK <= 64), RangeBackwardQuerySm90Shape<Element, kDimK, kDimV, 3, 80, 6, 4, 4>,
    std::conditional_t<(kDimK <= 128), RangeBackwardQuerySm90Shape<Element, kDimK, kDimV, 3, 64, 4, 3, 3>,
                       RangeBackwardQuerySm90Shape<Element, kDimK, kDimV, 2, 80, 2, 3, 2>>>;

// Whether it ran: it does not where the GPU, the build or the tensors do not suit it.
template <typename Element, int kDimK, int kDimV>
bool try_range_backward_query_sm90(const RangeBackwardParams& params, cudaStream_t stream) {
  using Shape = GradQuerySm90ShapeFor<Element, kDimK, kDimV>;
  if (!range_backward_query_fits_sm90(params) || tensor_map_encoder() == nullptr ||
      !runs_on_this_device(range_backward_query_sm90<Shape>, "gradient of q over a range")) {
    return false;
  }
  launch_range_backward_query_shape<Shape>(params, stream);
  return true;
}

}  // namespace nsa
