// Launch of Hopper's kernel for the gradient of q, and the tile sizes it runs with.
#pragma once

#include "common/sm90/launch.cuh"
#include "range/cuda/kernels.h"
#include "range/plan.h"
#include "range/sm90/backward_query.cuh"

namespace nsa {

template <typename Shape>
void launch_range_backward_query_shape(const RangeBackwardParams& range, cudaStream_t stream) {
  constexpr const char* kName = "gradient of q over a range";
  constexpr ElementType kType = kElementType<typename Shape::Element>;
  const SequenceLayout& s = range.sequences;
  const int32_t rows = range_sm90::filled_rows(s.group);
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

template <typename Element, int kDimK, int kDimV, range_sm90::QuerySizes kSizes = range_sm90::query_sizes(kDimK)>
using GradQuerySm90ShapeFor = RangeBackwardQuerySm90Shape<Element, kDimK, kDimV, kSizes.groups, kSizes.keys,
                                                          kSizes.row_slots, kSizes.k_stages, kSizes.v_stages>;

template <typename Element, int kDimK, int kDimV>
void launch_range_backward_query_sm90(const RangeBackwardParams& params, cudaStream_t stream) {
  using Shape = GradQuerySm90ShapeFor<Element, kDimK, kDimV>;
  static_assert(states_sm90(range_sm90::backward_query_tile({kDimK, kDimV}), sizeof(typename Shape::Shared)));
  launch_range_backward_query_shape<Shape>(params, stream);
}

}  // namespace nsa
