// Attention over listed blocks, backward, for Hopper: the gradients of k and v. common/key_gradients_sm90.cuh has the
// formulas.
//
// A block of threads has two warpgroups that work for themselves: each holds the 64 keys of one block and KV head, and
// sums over the queries that chose it, or one segment of them (ChosenBy). Of a third warpgroup, two warps feed each:
// one copies Q and dO of a step's queries, each query's G heads by a box of their own, the other gathers lse, gate and
// delta. Lists are walked from their ends: there blocks that are worked on together are chosen equally often, whatever
// their number, so that they meet the same queries at about the same time.
//
// Shared memory, of each: K, V | a ring of stages, each Q, dO and numbers of a step's rows.
#pragma once

#include "common/key_gradients_sm90.cuh"
#include "selected/backward_keys_sm80.cuh"

namespace nsa {

struct SelectedBackwardKeysSm90Params {
  SelectedBackwardParams selected;
  int64_t first_block;  // of ChosenBy: those of the KV heads that are worked on
  int64_t end_block;
  int32_t step_queries;  // of a step: floor(kRows / G)
  CUtensorMap q;         // boxes of 64 columns, G heads, one token
  CUtensorMap grad_out;
  CUtensorMap k;  // boxes of 64 columns, one head, 64 tokens
  CUtensorMap v;
};

// What a warpgroup does.
struct SelectedKeyItem {
  SelectedKeyTile tile;
  int64_t id;           // of the block in ChosenBy
  int32_t segment;      // of the block's
  int32_t segments;     // that the block has
  const int32_t* list;  // queries, counted through the batch
  int32_t queries;
  int32_t handed_begin;  // where scores of the batch's first query go, in units of 32 bytes
};

template <typename Shape>
struct SelectedBackwardKeysShared {
  struct Part {
    alignas(1024) typename Shape::Element k[Shape::KTile::kSize];
    alignas(1024) typename Shape::Element v[Shape::VTile::kSize];
    RowRing<Shape> ring;
    // Where a row's scores go, in units of 32 bytes; below 0: nowhere. Of the step that was released last, too.
    int32_t handed_at[Shape::kStages + 1][Shape::kRows];
    Barrier keys_full;
    SelectedKeyItem item;
    KeyGradientsPlace place;
  };
  Part parts[2];
};

// The last block whose segments begin at or before `segment`, by a warp.
__device__ inline int64_t find_block_of_segment(const ChosenBy& chosen_by, int64_t segment, int lane) {
  int64_t low = 0;  // the block is in [low, low + count)
  int64_t count = chosen_by.blocks;
  while (count > 1) {
    const int64_t step = ceil_div(count, 32);
    const int64_t probe = low + lane * step;
    const bool before = lane * step < count && chosen_by.segments[probe] <= segment;
    const int last = 31 - __clz(static_cast<int>(__ballot_sync(0xffffffffu, before)));
    low += last * step;
    count = min_of(step, count - last * step);
  }
  return low;
}

// By a warp, into shared memory. Tiles without keys, and segments that do not exist, have count 0.
template <typename Shape>
__device__ inline void find_item(const SelectedBackwardParams& params, int64_t segment, int64_t end,
                                 typename SelectedBackwardKeysShared<Shape>::Part& part, int lane) {
  const ChosenBy& chosen_by = params.chosen_by;
  SelectedKeyItem item{};
  if (segment < end) {
    item.id = find_block_of_segment(chosen_by, segment, lane);
    item.tile = selected_key_tile<Shape::kKeys>(params, item.id, 0);
    const int32_t first_segment = chosen_by.segments[item.id];
    const int32_t begin = chosen_by.begins[item.id];
    item.segment = static_cast<int32_t>(segment - first_segment);
    item.segments = chosen_by.segments[item.id + 1] - first_segment;
    item.list = chosen_by.queries + begin + int64_t{item.segment} * chosen_by.segment;
    item.queries = min(chosen_by.begins[item.id + 1] - begin - item.segment * chosen_by.segment, chosen_by.segment);
    item.handed_begin = static_cast<int32_t>((item.tile.head_kv - params.handed.first_head) * params.handed.queries *
                                             static_cast<int64_t>(chosen_by.ranks.divisor) *
                                             HandedScores::units(params.sequences.group));
  }
  if (lane == 0) {
    part.item = item;
    const SequencePlace& place = item.tile.place;
    part.place = {.first_key = item.tile.first_key,
                  .count = item.tile.count,
                  .batch = static_cast<int32_t>(place.batch),
                  .to_token = static_cast<int32_t>(place.q_begin) - place.offset,
                  .first_head = item.tile.head_kv * params.sequences.group};
  }
}

template <typename Shape>
__device__ inline void copy_chosen_rows(const SelectedBackwardKeysSm90Params& params,
                                        typename SelectedBackwardKeysShared<Shape>::Part& part, int lane) {
  using QTile = typename Shape::QTile;
  using GradOutTile = typename Shape::GradOutTile;
  constexpr int kPanels = QTile::kPanels + GradOutTile::kPanels;
  constexpr int kMostBoxes = 2;  // of a lane: four heads or more fill a box
  const SelectedKeyItem& item = part.item;
  const SequencePlace& place = item.tile.place;
  const Sequences& s = params.selected.sequences;
  const int32_t batch = static_cast<int32_t>(place.batch);
  if (lane == 0) {
    prefetch_map(&params.q);
    prefetch_map(&params.grad_out);
    arrive_expecting(&part.keys_full, Shape::kKeyBytes);
    const int32_t key = static_cast<int32_t>(place.k_begin) + item.tile.first_key;
    for (int panel = 0; panel < Shape::KTile::kPanels; ++panel) {
      copy_box(part.k + panel * Shape::KTile::kPanelSize, &params.k, &part.keys_full, 64 * panel, item.tile.head_kv,
               key, batch, kEvictNormal);
    }
    for (int panel = 0; panel < Shape::VTile::kPanels; ++panel) {
      copy_box(part.v + panel * Shape::VTile::kPanelSize, &params.v, &part.keys_full, 64 * panel, item.tile.head_kv,
               key, batch, kEvictNormal);
    }
  }

  // The lane's boxes: of which of a step's queries, and where they go.
  const int32_t to_token = static_cast<int32_t>(-place.batch * s.length_q);
  const int32_t* const list = item.list;
  const int32_t queries = item.queries;
  const auto index_of = [&](int box) { return (lane + 32 * box) / kPanels; };
  const auto query_at = [&](int32_t end, int box) {
    return static_cast<int32_t>(
        params.selected.chosen_by.ranks.divide(static_cast<uint32_t>(list[max(end - 1 - index_of(box), 0)])));
  };
  RowRing<Shape>& ring = part.ring;
  RingPlace<Shape::kStages> ring_place;
  int32_t next[kMostBoxes];
  if (queries > 0) {
#pragma unroll
    for (int box = 0; box < kMostBoxes; ++box) {
      next[box] = query_at(queries, box);
    }
  }
  const uint32_t bytes = params.step_queries * s.group * (Shape::kDimK + Shape::kDimV) * 2;
  for (int32_t end = queries; end > 0; end -= params.step_queries) {
    const int stage = ring_place.stage;
    Barrier* const full = &ring.full[stage];
    int32_t query[kMostBoxes];
#pragma unroll
    for (int box = 0; box < kMostBoxes; ++box) {
      query[box] = next[box];
      next[box] = query_at(end - params.step_queries, box);
    }
    wait(&ring.empty[stage], ring_place.parity ^ 1);
    if (lane == 0) {
      arrive_expecting(full, bytes);
    }
    __syncwarp();
#pragma unroll
    for (int box = 0; box < kMostBoxes; ++box) {
      const int index = index_of(box);
      if (index < params.step_queries) {
        // Where no query is left, rows are read from outside the tensor: zeros.
        const int32_t token = index < end ? query[box] + to_token : static_cast<int32_t>(s.length_q);
        const int panel = (lane + 32 * box) % kPanels;
        const int32_t head = item.tile.head_kv * s.group;
        if (panel < QTile::kPanels) {
          copy_box(ring.q[stage] + panel * QTile::kPanelSize + index * s.group * 64, &params.q, full, 64 * panel, head,
                   token, batch, kEvictNormal);
        } else {
          copy_box(ring.grad_out[stage] + (panel - QTile::kPanels) * GradOutTile::kPanelSize + index * s.group * 64,
                   &params.grad_out, full, 64 * (panel - QTile::kPanels), head, token, batch, kEvictNormal);
        }
      }
    }
    ring_place.advance();
  }
}

template <typename Shape>
__device__ inline void gather_chosen_numbers(const SelectedBackwardKeysSm90Params& params,
                                             typename SelectedBackwardKeysShared<Shape>::Part& part, int lane) {
  constexpr int kPerLane = (Shape::kRows + 31) / 32;
  const SelectedBackwardParams& selected = params.selected;
  const SelectedKeyItem& item = part.item;
  const SequencePlace& place = item.tile.place;
  const Sequences& s = selected.sequences;
  const int32_t to_token = static_cast<int32_t>(-place.batch * s.length_q);
  const int32_t to_position = static_cast<int32_t>(place.offset - place.q_begin);
  const int32_t* const list = item.list;
  const int32_t queries = item.queries;
  RowRing<Shape>& ring = part.ring;
  RingPlace<Shape::kStages> ring_place;
  int32_t next[kPerLane];  // the row's query in the next step
  const Divisor& ranks = selected.chosen_by.ranks;
  int handed_slot = 0;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    next[i] = queries > 0 ? list[max(queries - 1 - row_at(s, 0, lane + 32 * i).query, 0)] : 0;
  }
  for (int32_t end = queries; end > 0; end -= params.step_queries) {
    const int stage = ring_place.stage;
    float lse[kPerLane];
    float gate[kPerLane];
    float delta[kPerLane];
    int32_t position[kPerLane];
    int32_t handed_at[kPerLane];
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const Row at = row_at(s, 0, fresh_thread() % 32 + 32 * i);
      const int32_t head = item.tile.head_kv * s.group + at.head;
      const bool valid = at.query < params.step_queries && at.query < end;
      const auto query = static_cast<int32_t>(ranks.divide(static_cast<uint32_t>(next[i])));
      handed_at[i] =
          valid ? item.handed_begin + next[i] * HandedScores::units(s.group) + HandedScores::head_units(at.head) : -1;
      const int64_t token = query + to_token;
      next[i] = list[max(end - params.step_queries - 1 - at.query, 0)];
      lse[i] = valid ? selected.lse.at(place.batch, head, token) * kLog2E : -kMinusInfinity;
      delta[i] = valid ? selected.delta.at(place.batch, head, token) : 0.f;
      gate[i] = valid && selected.gate.data != nullptr ? selected.gate.at(place.batch, head, token) : 1.f;
      position[i] = static_cast<int32_t>(token) + to_position;
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
        part.handed_at[handed_slot][row] = handed_at[i];
      }
    }
    arrive(&ring.full[stage]);
    ring_place.advance();
    handed_slot = handed_slot == Shape::kStages ? 0 : handed_slot + 1;
  }
}

// Hands the gradients of a step's scores over, turned round so that they are left operands of the gradient of q: while
// the first products of the next step run.
template <typename Shape>
struct HandsScoresOver {
  const typename SelectedBackwardKeysShared<Shape>::Part& part;
  uint2* to;  // may be null
  int key_units;
  int slot;  // in handed_at, of the step that is kept: at first one with no place to go
  uint32_t kept[Shape::kRows / 16][4];

  __device__ HandsScoresOver(const typename SelectedBackwardKeysShared<Shape>::Part& part_,
                             const SelectedBackwardParams& params)
      : part(part_),
        to(static_cast<uint2*>(params.handed.data)),
        key_units(HandedScores::key_units(params.sequences.group)),
        slot(Shape::kStages),
        kept{} {}
  __device__ void keep(const uint32_t (&score_grads)[Shape::kRows / 16][4]) {
    slot = slot == Shape::kStages ? 0 : slot + 1;
#pragma unroll
    for (int i = 0; i < Shape::kRows / 16; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        kept[i][j] = score_grads[i][j];
      }
    }
  }
  __device__ void send() const {
    if (to == nullptr) {
      return;
    }
    const int lane = fresh_thread() % 32;
    const int warp = fresh_thread() % kWarpgroup / 32;
    // Keys after the end of a sequence may be anything.
    const int32_t keys = part.place.count - 16 * warp - lane / 4;
#pragma unroll
    for (int i = 0; i < Shape::kRows / 8; ++i) {
      const uint32_t first = turn_matrix(keys > 0 ? kept[i / 2][2 * (i % 2)] : 0u);
      const uint32_t second = turn_matrix(keys > 8 ? kept[i / 2][2 * (i % 2) + 1] : 0u);
      const int32_t at = part.handed_at[slot][8 * i + lane / 4];
      if (at >= 0) {
        __stcs(to + (int64_t{at} + key_units * warp) * 4 + lane % 4, make_uint2(first, second));
      }
    }
  }
};

template <typename Shape>
__device__ inline void sum_chosen_gradients(const SelectedBackwardKeysSm90Params& params,
                                            typename SelectedBackwardKeysShared<Shape>::Part& part) {
  using Element = typename Shape::Element;
  const SelectedBackwardParams& selected = params.selected;
  KeyGradientSums<Shape> sums;
  RingPlace<Shape::kStages> ring_place;
  HandsScoresOver<Shape> hand_over(part, selected);
  wait(&part.keys_full, 0);
  sum_key_gradients(sums, part.ring, ring_place, part.k, part.v, part.place,
                    {.stride = 1, .first_seen = 0, .window = Visibility::kNoWindow, .by_stride = Divisor()},
                    selected.scale, selected.sequences, selected.grad_lse,
                    (part.item.queries + params.step_queries - 1) / params.step_queries, hand_over);
  const SelectedKeyItem& item = part.item;
  if (item.segments > 1) {
    const int64_t index = int64_t{selected.chosen_by.partials[item.id]} + item.segment;
    store_partial_sums(selected.partials + index * (Shape::kKeys * (Shape::kDimK + Shape::kDimV)), sums,
                       selected.scale);
    return;
  }
  const SelectedKeyTile& tile = item.tile;
  const int64_t key = tile.place.k_begin + tile.first_key;
  store_gradients(selected.grad_k.row<Element>(tile.place.batch, key, tile.head_kv), selected.grad_k.token_stride,
                  tile.count, selected.grad_k.width, sums.k, selected.scale);
  store_gradients(selected.grad_v.row<Element>(tile.place.batch, key, tile.head_kv), selected.grad_v.token_stride,
                  tile.count, selected.grad_v.width, sums.v, 1.f);
}

// Empty unless it is compiled for sm_90a: see runs_on_this_device.
template <typename Shape>
__global__ void __launch_bounds__(3 * kWarpgroup, 1)
    selected_backward_keys_sm90(const __grid_constant__ SelectedBackwardKeysSm90Params params) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) unsigned char selected_shared_bytes[];
  auto& shared = *reinterpret_cast<SelectedBackwardKeysShared<Shape>*>(selected_shared_bytes);
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % 32;
  const int warp = __shfl_sync(0xffffffffu, thread / 32, 0);
  if (warp < 2) {
    auto& part = shared.parts[warp];
    const ChosenBy& chosen_by = params.selected.chosen_by;
    find_item<Shape>(params.selected, chosen_by.segments[params.first_block] + 2 * int64_t{blockIdx.x} + warp,
                     chosen_by.segments[params.end_block], part, lane);
    if (lane == 0) {
      part.ring.init_barriers(1);
      init_barrier(&part.keys_full, 1);
      fence_barrier_init();
    }
  }
  if (thread < Shape::kRows) {
    shared.parts[0].handed_at[Shape::kStages][thread] = shared.parts[1].handed_at[Shape::kStages][thread] = -1;
  }
  const int unfilled = params.step_queries * params.selected.sequences.group;
  for (int part = 0; part < 2; ++part) {
    clear_rows(shared.parts[part].ring, unfilled, thread, 3 * kWarpgroup);
  }
  fence_shared_writes();
  __syncthreads();
  if (warp < 4) {
    shrink_registers<Shape::kProducerRegisters>();
    auto& part = shared.parts[warp / 2];
    if (part.item.tile.count > 0) {
      if (warp % 2 == 0) {
        copy_chosen_rows<Shape>(params, part, lane);
      } else {
        gather_chosen_numbers<Shape>(params, part, lane);
      }
    }
  } else {
    grow_registers<Shape::kConsumerRegisters>();
    auto& part = shared.parts[warp / 4 - 1];
    if (part.item.tile.count > 0) {
      sum_chosen_gradients<Shape>(params, part);
    }
  }
#endif
}

}  // namespace nsa
