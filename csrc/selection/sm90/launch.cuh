// Launches of the kernel for Hopper, and the shapes it runs with.
#pragma once

#include "common/sm90/launch.cuh"
#include "selection/cuda/kernels.h"
#include "selection/sm90/select.cuh"

namespace nsa {

template <typename Element, int kDim, int kSlot, int kListed>
using BestSelectSm90Shape =
    SelectSm90Shape<Element, kDim, kSlot, kListed, select_sm90::consumers(kDim, kSlot, kListed),
                    (select_sm90::consumers(kDim, kSlot, kListed) == 2 ? 4 : 2), select_sm90::stages(kDim, kSlot),
                    select_sm90::strip_tiles(kDim, kSlot, kListed)>;

template <typename Shape>
void launch_select_shape_sm90(const SelectBlocksParams& select, cudaStream_t stream) {
  constexpr const char* kName = "choice of blocks";
  constexpr ElementType kType = kElementType<typename Shape::Element>;
  static_assert(
      states_sm90(select_sm90::tile(Shape::kDim, Shape::kSlot, Shape::kListed), sizeof(typename Shape::Shared)));
  const SequenceLayout& s = select.sequences;
  const int32_t parts = static_cast<int32_t>(ceil_div(s.group, Shape::kSlot));
  const int32_t queries = Shape::kSlots / parts;
  const int32_t block_queries = Shape::kConsumers * queries;
  const int64_t slots = count_slots(s, s.length_q, block_queries);
  const int64_t tiles = slots * s.heads_kv;
  if (tiles > 0x3fffffff) {
    throw std::runtime_error("nsa_torch: choice of blocks: too many tiles for one launch");
  }
  const int64_t batch = s.packed() ? 1 : s.batch;
  const bool whole = s.group == parts * Shape::kSlot;
  const auto group = static_cast<uint32_t>(s.group);
  SelectSm90Params params{
      .select = select,
      .steps = TileSteps(select),
      .seen = {select.block_stride, select.block_size - 1, Visibility::kNoWindow, Divisor(select.block_stride)},
      .by_heads_kv = Divisor(s.heads_kv),
      .by_block_queries = Divisor(block_queries),
      .by_tiles = Divisor(s.packed() ? 1 : static_cast<uint32_t>(max_of(ceil_div(s.length_q, block_queries), 1))),
      .by_select_size = Divisor(select.select_size),
      .by_blocks = Divisor(TileSteps(select).blocks),
      .by_parts = Divisor(parts),
      .initial = static_cast<int32_t>(select.forced.initial),
      .local = static_cast<int32_t>(select.forced.local),
      .slots = static_cast<int32_t>(slots),
      .tiles = static_cast<int32_t>(tiles),
      .parts = parts,
      .queries = queries,
      .consumer_bytes = queries * s.group * Shape::kDim * static_cast<int32_t>(sizeof(typename Shape::Element)),
      .q = tensor_map(select.q, kType, batch, s.length_q, int64_t{s.heads_kv} * s.group, group, whole ? queries : 1,
                      kName),
      .k = tensor_map(select.k, kType, batch, select.num_keys, s.heads_kv, 1, kKeysPerTile, kName)};
  launch(select_blocks_sm90<Shape>, min_of(tiles, multiprocessors(kName)), Shape::kThreads,
         sizeof(typename Shape::Shared), stream, kName, params);
}

template <typename Element, int kDim, int kSlot>
void launch_select_slots_sm90(const SelectBlocksParams& params, int32_t listed, cudaStream_t stream) {
  if (listed == 16) {
    return launch_select_shape_sm90<BestSelectSm90Shape<Element, kDim, kSlot, 16>>(params, stream);
  }
  if (listed == 32) {
    return launch_select_shape_sm90<BestSelectSm90Shape<Element, kDim, kSlot, 32>>(params, stream);
  }
  if constexpr (select_sm90::most_listed(kDim, kSlot) == 64) {
    launch_select_shape_sm90<BestSelectSm90Shape<Element, kDim, kSlot, 64>>(params, stream);
  } else {
    throw std::runtime_error("nsa_torch: choice of blocks: the plan asks for lists that this kernel has no room for");
  }
}

template <typename Element, int kDim>
void launch_select_blocks_sm90(const SelectBlocksParams& params, const SelectBlocksPlan& plan, cudaStream_t stream) {
  if (plan.slot == 4) {
    launch_select_slots_sm90<Element, kDim, 4>(params, plan.listed, stream);
  } else if (plan.slot == 8) {
    launch_select_slots_sm90<Element, kDim, 8>(params, plan.listed, stream);
  } else {
    launch_select_slots_sm90<Element, kDim, select_sm90::kLargestSlot>(params, plan.listed, stream);
  }
}

}  // namespace nsa
