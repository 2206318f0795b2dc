// Launches of the kernel for Hopper, which calls it takes, and the shapes it runs with.
#pragma once

#include "common/launch_sm90.cuh"
#include "selection/select_sm90.cuh"

namespace nsa {

// Heads of a slot: of larger groups a query has several slots.
constexpr int32_t kLargestSlot = 16;

// Small slots have many lists: where ranking takes longer than the products of two consumers, twice as many warps rank.
// As many stages of keys and steps of strips as shared memory holds.
template <int kDim, int kSlot, int kListed>
constexpr int kBestConsumers = kSlot == 4 || (kSlot == 8 && (kDim > 128 || kListed == 64)) ? 2 : 3;
template <int kDim, int kSlot, int kListed>
constexpr int kMostStripTiles = kSlot < kLargestSlot ? (kDim > 128 && kSlot == 4 ? 1 : 3)
                                : kDim > 128         ? 1
                                : kListed == 64      ? 3
                                                     : 7;
template <typename Element, int kDim, int kSlot, int kListed>
using BestSelectSm90Shape =
    SelectSm90Shape<Element, kDim, kSlot, kListed, kBestConsumers<kDim, kSlot, kListed>,
                    (kBestConsumers<kDim, kSlot, kListed> == 2 ? 4 : 2), (kDim <= 128 && kSlot == kLargestSlot ? 4 : 2),
                    kMostStripTiles<kDim, kSlot, kListed>>;
// Blocks of a list.
template <int kDim, int kSlot>
constexpr int kMostListed = kDim > 128 && kSlot == 4 ? 32 : 64;

// Whether this call suits the kernel; others run on the sm_80 kernel.
inline bool select_blocks_fits_sm90(const SelectBlocksParams& params) {
  const Sequences& s = params.sequences;
  const int64_t batch = s.packed() ? 1 : s.batch;
  return s.group <= 128 && params.q.width <= 192 && params.num_keys > 0 &&
         copies_by_map(params.q, batch, s.length_q, int64_t{s.heads_kv} * s.group) &&
         copies_by_map(params.k, batch, params.num_keys, s.heads_kv);
}

template <typename Shape>
bool try_select_shape_sm90(const SelectBlocksParams& select, cudaStream_t stream) {
  constexpr const char* kName = "choice of blocks";
  constexpr ElementType kType = kElementType<typename Shape::Element>;
  const Sequences& s = select.sequences;
  const int32_t parts = static_cast<int32_t>(ceil_div(s.group, Shape::kSlot));
  const int32_t queries = Shape::kSlots / parts;
  if (!runs_on_this_device(select_blocks_sm90<Shape>, kName)) {
    return false;
  }
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
  return true;
}

template <typename Element, int kDim, int kSlot>
bool try_select_slots_sm90(const SelectBlocksParams& params, cudaStream_t stream) {
  if (params.num_selected <= 16) {
    return try_select_shape_sm90<BestSelectSm90Shape<Element, kDim, kSlot, 16>>(params, stream);
  }
  if (params.num_selected <= 32) {
    return try_select_shape_sm90<BestSelectSm90Shape<Element, kDim, kSlot, 32>>(params, stream);
  }
  if constexpr (kMostListed<kDim, kSlot> == 64) {
    return try_select_shape_sm90<BestSelectSm90Shape<Element, kDim, kSlot, 64>>(params, stream);
  }
  return false;
}

// Whether it ran: it does not where the GPU, the build, the tensors or the options do not suit it.
template <typename Element, int kDim>
bool try_select_blocks_sm90(const SelectBlocksParams& params, cudaStream_t stream) {
  if (!select_blocks_fits_sm90(params) || tensor_map_encoder() == nullptr) {
    return false;
  }
  if (params.sequences.group <= 4) {
    return try_select_slots_sm90<Element, kDim, 4>(params, stream);
  }
  if (params.sequences.group <= 8) {
    return try_select_slots_sm90<Element, kDim, 8>(params, stream);
  }
  return try_select_slots_sm90<Element, kDim, kLargestSlot>(params, stream);
}

}  // namespace nsa
