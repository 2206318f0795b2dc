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

#include "range/key_tile.cuh"
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

// A tile of keys, the queries of its sequence that see any of them, and how those are split.
struct RangeKeyTileSm90 {
  SeenKeys keys;
  int32_t origin;  // where splits are counted from
  int32_t splits;

  // Queries [begin, end) of a split.
  __device__ int32_t begin(int32_t split, int32_t split_queries) const {
    return max(keys.first_query, first_split(split_queries) + split * split_queries);
  }
  __device__ int32_t end(int32_t split, int32_t split_queries) const {
    return min(keys.end_query, first_split(split_queries) + (split + 1) * split_queries);
  }
  __device__ int32_t first_split(int32_t split_queries) const {
    return (keys.first_query - origin) / split_queries * split_queries + origin;
  }
};

template <int kKeys>
__device__ inline RangeKeyTileSm90 range_key_tile_sm90(const RangeBackwardParams& params, int32_t slot) {
  RangeKeyTileSm90 result{.keys = seen_keys<kKeys>(params, slot), .origin = 0, .splits = 1};
  const SeenKeys& keys = result.keys;
  if (keys.end_query > 0) {
    const int32_t split_queries = params.rows_per_split / params.sequences.group;
    result.origin = params.visibility.window == Visibility::kNoWindow ? 0 : keys.first_query;
    result.splits = static_cast<int32_t>(ceil_div(keys.end_query - result.origin, split_queries)) -
                    (keys.first_query - result.origin) / split_queries;
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

// The work of this block of threads; a split below 0 where there is none.
template <int kKeys>
__device__ inline RangeKeyItem range_key_item(const RangeBackwardKeysSm90Params& params) {
  RangeKeyItem item;
  const auto slots = static_cast<unsigned>(params.slots);
  const auto heads = static_cast<unsigned>(params.range.sequences.heads_kv);
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
  item.tile = range_key_tile_sm90<kKeys>(params.range, item.slot);
  // The last split of every tile belongs to the same queries.
  item.split = of_first_splits ? 0 : item.tile.splits - 1 - static_cast<int32_t>(turn);
  if (item.tile.keys.count == 0 || (item.split == 0 && !of_first_splits)) {
    item.split = -1;
  }
  const int32_t split_queries = params.range.rows_per_split / params.range.sequences.group;
  item.begin = item.tile.begin(item.split, split_queries);
  item.end = item.tile.end(item.split, split_queries);
  return item;
}

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
  prefetch_map(&params.q);
  prefetch_map(&params.grad_out);
  const RangeKeyItem& item = shared.item;
  const SequencePlace& place = item.tile.keys.place;
  const SequenceLayout& s = params.range.sequences;
  const int32_t batch = static_cast<int32_t>(place.batch);
  const int32_t head = item.head_kv * s.group;
  arrive_expecting(&shared.keys_full, 2 * Shape::kKeyBytes);
  for (int i = 0; i < 2; ++i) {
    const int32_t token = static_cast<int32_t>(item.tile.keys.begin) + item.tile.keys.first_key + i * Shape::kKeys;
    copy_panels<typename Shape::KTile>(shared.k[i], params.k, &shared.keys_full, item.head_kv, token, batch,
                                       kEvictNormal);
    copy_panels<typename Shape::VTile>(shared.v[i], params.v, &shared.keys_full, item.head_kv, token, batch,
                                       kEvictNormal);
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
      copy_panels<typename Shape::QTile>(ring.q[stage] + row * 64, q, full, head, token, batch, kEvictNormal);
      copy_panels<typename Shape::GradOutTile>(ring.grad_out[stage] + row * 64, grad_out, full, head, token, batch,
                                               kEvictNormal);
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
  const SequencePlace& place = item.tile.keys.place;
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
    ring.numbers[stage].set(lane, lse, gate, delta, position);
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
      const int64_t origin = int64_t{item.tile.keys.place.offset} + item.begin;
      const int64_t first = (range.visibility.first_position(place.first_key) - origin) / step_queries;
      const int64_t last = range.visibility.last_position(place.first_key + place.count - 1) - origin;
      skipped = static_cast<int32_t>(max_of(min_of(first, steps), 0));
      end = static_cast<int32_t>(max_of(min_of(last < 0 ? 0 : last / step_queries + 1, steps), skipped));
    }
    RingPlace<Shape::kStages> ring_place;
    wait(&shared.keys_full, 0);
    skip_steps(shared.ring, ring_place, skipped);
    RangeKeySums<Shape>(sums, shared.ring, ring_place, shared.k[consumer], shared.v[consumer], place, range)
        .walk(item.tile.keys.place.offset + item.begin + skipped * step_queries, step_queries, end - skipped);
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
  const int64_t key = item.tile.keys.begin + place.first_key;
  store_gradients(range.grad_k.row<Element>(item.tile.keys.place.batch, key, item.head_kv), range.grad_k.token_stride,
                  place.count, range.grad_k.width, sums.k, range.scale);
  store_gradients(range.grad_v.row<Element>(item.tile.keys.place.batch, key, item.head_kv), range.grad_v.token_stride,
                  place.count, range.grad_v.width, sums.v, 1.f / kWeightScale<Element>);
}

// Empty unless it is compiled for sm_90a: see runs_on_this_device.
template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    range_backward_keys_sm90(const __grid_constant__ RangeBackwardKeysSm90Params params) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  auto& shared = shared_memory<RangeBackwardKeysShared<Shape>>();
  const int32_t group = params.range.sequences.group;
  const RangeKeyItem item = range_key_item<2 * Shape::kKeys>(params);
  if (item.split < 0) {
    return;
  }
  if (threadIdx.x == 0) {
    shared.item = item;
    for (int i = 0; i < 2; ++i) {
      shared.places[i] = {.first_key = item.tile.keys.first_key + i * Shape::kKeys,
                          .count = min(max(item.tile.keys.count - i * Shape::kKeys, 0), Shape::kKeys),
                          .batch = static_cast<int32_t>(item.tile.keys.place.batch),
                          .to_token = static_cast<int32_t>(item.tile.keys.place.q_begin) - item.tile.keys.place.offset,
                          .first_head = item.head_kv * group};
    }
    shared.ring.init_barriers(2);
    init_barrier(&shared.keys_full, 1);
    fence_barrier_init();
  }
  clear_rows(shared.ring, params.step_queries * group, static_cast<int>(threadIdx.x), Shape::kThreads);
  fence_shared_writes();
  __syncthreads();
  const auto feed = [&] {
    if (threadIdx.x == 0) {
      copy_range_rows<Shape>(params, shared);
    } else if (threadIdx.x / 32 == 1) {
      gather_range_numbers<Shape>(params, shared);
    }
  };
  split_warpgroups<Shape>(feed, [&](int consumer) { sum_range_gradients<Shape>(params, shared, consumer); });
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
  if (tile.splits <= 1 || key >= tile.keys.count) {
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
    *reinterpret_cast<uint2*>(
        to.row<Element>(tile.keys.place.batch, tile.keys.begin + tile.keys.first_key + key, head_kv) + to_column) =
        make_uint2(pack<Element>(sum.x, sum.y), pack<Element>(sum.z, sum.w));
  }
}

}  // namespace nsa
