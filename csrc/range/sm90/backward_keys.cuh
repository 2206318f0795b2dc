// Attention over a range of keys, backward, for Hopper: the gradients of k and v. common/sm90/key_gradients.cuh has the
// formulas.
//
// A block of threads holds 128 keys of one KV head, 64 for each of two warpgroups, and walks the rows that see any of
// them, or one split of those rows: the G heads of 64 / G queries a step. Warps of a third warpgroup feed it: one
// copies Q and dO, one gathers lse, gate and delta. Blocks that run together walk the same queries at about the same
// time, so that rows leave memory about once: splits end at the same queries for every key of a sequence, and the last
// go first. A tile's first split is shorter; those go in the end, the longest first, and fill the gaps.
//
// Shared memory: K, V of both warpgroups | a ring of stages, each Q, dO and numbers of a step's rows.
#pragma once

#include "common/keys.cuh"
#include "range/params.h"
#include "range/sm90/sum_keys.cuh"

namespace nsa {

// Tiles of a sequence by the length of their first split, the longest first.
struct RangeKeyOrder {
  static constexpr int kMostTiles = 512;

  int32_t tiles;  // of each sequence; 0: as they come
  uint16_t tile[kMostTiles];
};

struct RangeBackwardKeysSm90Params {
  RangeBackwardParams range;
  int32_t slots;  // of tiles of 128 keys
  RangeKeyOrder order;
  int32_t step_queries;  // of a step: floor(kRows / G)
  CUtensorMap q;         // boxes of 64 columns, G heads, step_queries tokens
  CUtensorMap grad_out;
  CUtensorMap q_token;  // boxes of one token
  CUtensorMap grad_out_token;
  CUtensorMap k;  // boxes of 64 columns, one head, 64 tokens
  CUtensorMap v;
};

// A tile of keys of one KV head, and the queries of its sequence that see any of them.
struct RangeKeyTileSm90 {
  SequencePlace place;
  int64_t keys_begin;  // of the sequence
  int32_t first_key;   // within it
  int32_t count;       // keys that exist
  int32_t first_query;
  int32_t end_query;
  int32_t origin;  // where splits are counted from
  int32_t splits;

  // Queries [begin, end) of a split.
  __device__ int32_t begin(int32_t split, int32_t split_queries) const {
    return max(first_query, (first_query - origin) / split_queries * split_queries + origin + split * split_queries);
  }
  __device__ int32_t end(int32_t split, int32_t split_queries) const {
    return min(end_query,
               (first_query - origin) / split_queries * split_queries + origin + (split + 1) * split_queries);
  }
};

template <int kKeys>
__device__ inline RangeKeyTileSm90 range_key_tile_sm90(const RangeBackwardParams& params, int32_t slot) {
  const SequenceLayout& s = params.sequences;
  const Tile tile =
      find_tile(s, params.compressed ? s.cumulative_cmp : s.cumulative_k, 1, params.num_keys, kKeys, slot);
  RangeKeyTileSm90 result{};
  result.place = place_of(s, tile.sequence);
  KeysPlace keys = keys_of(result.place, params.visibility, params.compressed);
  if (!s.packed()) {
    keys.length = static_cast<int32_t>(params.num_keys);
  }
  result.keys_begin = keys.begin;
  result.first_key = tile.index * kKeys;
  result.count = max(min(kKeys, keys.length - result.first_key), 0);
  result.splits = 1;
  if (result.count == 0) {
    return result;
  }
  const int64_t offset = result.place.offset;
  const int64_t first = max_of(params.visibility.first_position(result.first_key) - offset, 0);
  const int64_t last =
      min_of(params.visibility.last_position(result.first_key + result.count - 1) - offset, result.place.q_length - 1);
  if (first <= last) {
    const int32_t split_queries = params.rows_per_split / s.group;
    result.first_query = static_cast<int32_t>(first);
    result.end_query = static_cast<int32_t>(last + 1);
    result.origin = params.visibility.window == Visibility::kNoWindow ? 0 : result.first_query;
    result.splits = static_cast<int32_t>(ceil_div(result.end_query - result.origin, split_queries)) -
                    (result.first_query - result.origin) / split_queries;
  }
  return result;
}

// What a block of threads does: a tile, and queries [begin, end) of those that see it.
struct RangeKeyItem {
  RangeKeyTileSm90 tile;
  int32_t slot;
  int32_t head_kv;
  int32_t split;
  int32_t begin;
  int32_t end;
};

template <typename Shape>
struct RangeBackwardKeysShared {
  alignas(1024) typename Shape::Element k[2][Shape::KTile::kSize];
  alignas(1024) typename Shape::Element v[2][Shape::VTile::kSize];
  RowRing<Shape> ring;
  Barrier keys_full;
  RangeKeyItem item;
  KeyGradientsPlace places[2];
};

template <typename Shape>
__device__ inline void copy_range_rows(const RangeBackwardKeysSm90Params& params,
                                       RangeBackwardKeysShared<Shape>& shared) {
  using QTile = typename Shape::QTile;
  using GradOutTile = typename Shape::GradOutTile;
  prefetch_map(&params.q);
  prefetch_map(&params.grad_out);
  const RangeKeyItem& item = shared.item;
  const SequencePlace& place = item.tile.place;
  const SequenceLayout& s = params.range.sequences;
  const int32_t batch = static_cast<int32_t>(place.batch);
  const int32_t head = item.head_kv * s.group;
  arrive_expecting(&shared.keys_full, 2 * Shape::kKeyBytes);
  for (int i = 0; i < 2; ++i) {
    const int32_t token = static_cast<int32_t>(item.tile.keys_begin) + item.tile.first_key + i * Shape::kKeys;
    for (int panel = 0; panel < Shape::KTile::kPanels; ++panel) {
      copy_box(shared.k[i] + panel * Shape::KTile::kPanelSize, &params.k, &shared.keys_full, 64 * panel, item.head_kv,
               token, batch, kEvictNormal);
    }
    for (int panel = 0; panel < Shape::VTile::kPanels; ++panel) {
      copy_box(shared.v[i] + panel * Shape::VTile::kPanelSize, &params.v, &shared.keys_full, 64 * panel, item.head_kv,
               token, batch, kEvictNormal);
    }
  }

  RowRing<Shape>& ring = shared.ring;
  RingPlace<Shape::kStages> ring_place;
  const uint32_t bytes = params.step_queries * s.group * (Shape::kDimK + Shape::kDimV) * 2;
  for (int32_t query = item.begin; query < item.end; query += params.step_queries) {
    const int stage = ring_place.stage;
    Barrier* const full = &ring.full[stage];
    wait(&ring.empty[stage], ring_place.parity ^ 1);
    arrive_expecting(full, bytes);
    const auto copy = [&](const CUtensorMap& q, const CUtensorMap& grad_out, int row, int32_t token) {
#pragma unroll
      for (int panel = 0; panel < QTile::kPanels; ++panel) {
        copy_box(ring.q[stage] + panel * QTile::kPanelSize + row * 64, &q, full, 64 * panel, head, token, batch,
                 kEvictNormal);
      }
#pragma unroll
      for (int panel = 0; panel < GradOutTile::kPanels; ++panel) {
        copy_box(ring.grad_out[stage] + panel * GradOutTile::kPanelSize + row * 64, &grad_out, full, 64 * panel, head,
                 token, batch, kEvictNormal);
      }
    };
    const int32_t token = static_cast<int32_t>(place.q_begin) + query;
    if (!s.packed() || query + params.step_queries <= place.q_length) {
      copy(params.q, params.grad_out, 0, token);
    } else {
      // Rows after the end of a sequence may be NaN, which 0 does not undo: those are read from outside the tensor, as
      // 0.
      for (int32_t i = 0; i < params.step_queries; ++i) {
        copy(params.q_token, params.grad_out_token, i * s.group,
             query + i < place.q_length ? token + i : static_cast<int32_t>(s.length_q));
      }
    }
    ring_place.advance();
  }
}

template <typename Shape>
__device__ inline void gather_range_numbers(const RangeBackwardKeysSm90Params& params,
                                            RangeBackwardKeysShared<Shape>& shared) {
  constexpr int kPerLane = (Shape::kRows + 31) / 32;
  constexpr float kFactor = kWholeFactor<typename Shape::Element>;
  constexpr float kScale = kWeightScale<typename Shape::Element>;
  const float kShift = log2f(kFactor);
  const RangeBackwardParams& range = params.range;
  const RangeKeyItem& item = shared.item;
  const SequencePlace& place = item.tile.place;
  const SequenceLayout& s = range.sequences;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  RowRing<Shape>& ring = shared.ring;
  RingPlace<Shape::kStages> ring_place;
  for (int32_t query = item.begin; query < item.end; query += params.step_queries) {
    const int stage = ring_place.stage;
    float lse[kPerLane];
    float gate[kPerLane];
    float delta[kPerLane];
    int32_t position[kPerLane];
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const Row at = row_at(s, item.head_kv, lane + 32 * i);
      const bool valid = at.query < params.step_queries && query + at.query < item.end;
      const int32_t own_query = valid ? query + at.query : min(query + params.step_queries, item.end) - 1;
      const int32_t head = valid ? at.head : item.head_kv * s.group;
      const int64_t token = place.q_begin + own_query;
      lse[i] = valid ? fmaf(range.lse.at(place.batch, head, token), kLog2E, -kShift) : -kMinusInfinity;
      delta[i] = valid ? range.delta.at(place.batch, head, token) / kScale : 0.f;
      gate[i] =
          (valid && range.gate.data != nullptr ? range.gate.at(place.batch, head, token) : 1.f) * kScale / kFactor;
      position[i] = own_query + place.offset;
    }
    wait(&ring.empty[stage], ring_place.parity ^ 1);
    RowNumbers<Shape::kRows>& to = ring.numbers[stage];
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int row = lane + 32 * i;
      if (row < Shape::kRows) {
        to.weights[row] = make_float2(lse[i], gate[i]);
        to.delta[row] = delta[i];
        to.position[row] = position[i];
      }
    }
    arrive(&ring.full[stage]);
    ring_place.advance();
  }
}

template <typename Shape>
__device__ inline void sum_range_gradients(const RangeBackwardKeysSm90Params& params,
                                           RangeBackwardKeysShared<Shape>& shared, int consumer) {
  using Element = typename Shape::Element;
  const RangeBackwardParams& range = params.range;
  KeyGradientSums<Shape> sums;
  {
    // Steps of the block's that any of the warpgroup's keys has a part in.
    const RangeKeyItem& item = shared.item;
    const KeyGradientsPlace& place = shared.places[consumer];
    const int32_t step_queries = params.step_queries;
    const int32_t steps = (item.end - item.begin + step_queries - 1) / step_queries;
    int32_t skipped = steps;
    int32_t end = steps;
    if (place.count > 0) {
      const int64_t origin = int64_t{item.tile.place.offset} + item.begin;
      const int64_t first = (range.visibility.first_position(place.first_key) - origin) / step_queries;
      const int64_t last = range.visibility.last_position(place.first_key + place.count - 1) - origin;
      skipped = static_cast<int32_t>(max_of(min_of(first, steps), 0));
      end = static_cast<int32_t>(max_of(min_of(last < 0 ? 0 : last / step_queries + 1, steps), skipped));
    }
    RingPlace<Shape::kStages> ring_place;
    wait(&shared.keys_full, 0);
    skip_steps(shared.ring, ring_place, skipped);
    sum_range_key_gradients(sums, shared.ring, ring_place, shared.k[consumer], shared.v[consumer], place, range,
                            item.tile.place.offset + item.begin + skipped * step_queries, step_queries, end - skipped);
    skip_steps(shared.ring, ring_place, steps - end);
  }

  const RangeKeyItem& item = shared.item;
  const KeyGradientsPlace& place = shared.places[consumer];
  if (item.tile.splits > 1) {
    const int64_t tile = (int64_t{item.slot} * range.sequences.heads_kv + item.head_kv) * 2 + consumer;
    store_partial_sums(range.partials + (tile * range.splits + item.split) * (64 * (Shape::kDimK + Shape::kDimV)), sums,
                       range.scale, 1.f / kWeightScale<Element>);
    return;
  }
  const int64_t key = item.tile.keys_begin + place.first_key;
  store_gradients(range.grad_k.row<Element>(item.tile.place.batch, key, item.head_kv), range.grad_k.token_stride,
                  place.count, range.grad_k.width, sums.k, range.scale);
  store_gradients(range.grad_v.row<Element>(item.tile.place.batch, key, item.head_kv), range.grad_v.token_stride,
                  place.count, range.grad_v.width, sums.v, 1.f / kWeightScale<Element>);
}

// Empty unless it is compiled for sm_90a: see runs_on_this_device.
template <typename Shape>
__global__ void __launch_bounds__(3 * kWarpgroup, 1)
    range_backward_keys_sm90(const __grid_constant__ RangeBackwardKeysSm90Params params) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<RangeBackwardKeysShared<Shape>*>(shared_bytes);
  const SequenceLayout& s = params.range.sequences;
  const int thread = static_cast<int>(threadIdx.x);
  RangeKeyItem item;
  const auto slots = static_cast<unsigned>(params.slots);
  const auto heads = static_cast<unsigned>(s.heads_kv);
  const unsigned turn = blockIdx.x / (slots * heads);
  const unsigned place = blockIdx.x % (slots * heads);
  const bool of_first_splits = turn == static_cast<unsigned>(params.range.splits) - 1;
  if (of_first_splits && params.order.tiles > 0) {
    const auto tiles = static_cast<unsigned>(params.order.tiles);
    const unsigned of_rank = slots / tiles * heads;
    item.head_kv = static_cast<int32_t>(place % heads);
    item.slot = static_cast<int32_t>(place % of_rank / heads * tiles + params.order.tile[place / of_rank]);
  } else {
    item.head_kv = static_cast<int32_t>(place / slots);
    item.slot = static_cast<int32_t>(place % slots);
  }
  item.tile = range_key_tile_sm90<2 * Shape::kKeys>(params.range, item.slot);
  // The last split of every tile belongs to the same queries.
  item.split = of_first_splits ? 0 : item.tile.splits - 1 - static_cast<int32_t>(turn);
  if (item.tile.count == 0 || item.split < 0 || (item.split == 0 && !of_first_splits)) {
    return;
  }
  if (thread == 0) {
    const int32_t split_queries = params.range.rows_per_split / s.group;
    item.begin = item.tile.begin(item.split, split_queries);
    item.end = item.tile.end(item.split, split_queries);
    shared.item = item;
    for (int i = 0; i < 2; ++i) {
      shared.places[i] = {.first_key = item.tile.first_key + i * Shape::kKeys,
                          .count = min(max(item.tile.count - i * Shape::kKeys, 0), Shape::kKeys),
                          .batch = static_cast<int32_t>(item.tile.place.batch),
                          .to_token = static_cast<int32_t>(item.tile.place.q_begin) - item.tile.place.offset,
                          .first_head = item.head_kv * s.group};
    }
    shared.ring.init_barriers(2);
    init_barrier(&shared.keys_full, 1);
    fence_barrier_init();
  }
  clear_rows(shared.ring, params.step_queries * s.group, thread, 3 * kWarpgroup);
  fence_shared_writes();
  __syncthreads();
  const int warp = __shfl_sync(0xffffffffu, thread / 32, 0);
  if (warp < 4) {
    shrink_registers<Shape::kProducerRegisters>();
    if (thread == 0) {
      copy_range_rows<Shape>(params, shared);
    } else if (warp == 1) {
      gather_range_numbers<Shape>(params, shared);
    }
  } else {
    grow_registers<Shape::kConsumerRegisters>();
    sum_range_gradients<Shape>(params, shared, warp / 4 - 1);
  }
#endif
}

// Adds the splits of 64 keys in their order, four columns a thread: one block for each 1024 columns.
template <typename Shape>
__global__ void __launch_bounds__(256, 4)
    range_add_partials_sm90(const __grid_constant__ RangeBackwardKeysSm90Params params) {
  using Element = typename Shape::Element;
  constexpr unsigned kRowSize = Shape::kDimK + Shape::kDimV;
  constexpr unsigned kParts = 64 * kRowSize / 1024;
  const RangeBackwardParams& range = params.range;
  const auto heads = static_cast<unsigned>(range.sequences.heads_kv);
  const unsigned part = blockIdx.x % kParts;
  const unsigned half = blockIdx.x / kParts % 2;
  const auto head_kv = static_cast<int32_t>(blockIdx.x / kParts / 2 % heads);
  const RangeKeyTileSm90 tile =
      range_key_tile_sm90<2 * Shape::kKeys>(range, static_cast<int32_t>(blockIdx.x / kParts / 2 / heads));
  const unsigned at = part * 1024 + threadIdx.x * 4;
  const auto key = static_cast<int32_t>(half * 64 + at / kRowSize);
  const auto column = static_cast<int32_t>(at % kRowSize);
  if (tile.splits <= 1 || key >= tile.count) {
    return;
  }
  const float* from = range.partials + int64_t{blockIdx.x / kParts} * range.splits * (64 * kRowSize) + at;
  float4 sum{};
  for (int32_t split = 0; split < tile.splits; ++split) {
    const float4 x = *reinterpret_cast<const float4*>(from);
    sum = make_float4(sum.x + x.x, sum.y + x.y, sum.z + x.z, sum.w + x.w);
    from += 64 * kRowSize;
  }
  const bool of_k = column < Shape::kDimK;
  const TensorView& to = of_k ? range.grad_k : range.grad_v;
  const int32_t to_column = of_k ? column : column - Shape::kDimK;
  if (to_column < to.width) {
    *reinterpret_cast<uint2*>(to.row<Element>(tile.place.batch, tile.keys_begin + tile.first_key + key, head_kv) +
                              to_column) = make_uint2(pack<Element>(sum.x, sum.y), pack<Element>(sum.z, sum.w));
  }
}

}  // namespace nsa
