// What feeds the warpgroups of Hopper's gradients of k and v over listed blocks (backward_keys.cuh): who works on
// which piece, the copies of keys and of rows, and the numbers of rows.
#pragma once

#include "common/sm90/key_gradients.cuh"
#include "selected/params.h"

namespace nsa {

struct SelectedBackwardKeysSm90Params {
  SelectedBackwardParams selected;
  int32_t first_head;  // KV heads that are worked on
  int32_t end_head;
  int32_t first_block;   // of theirs
  int32_t* taken;        // pieces of theirs
  int32_t step_queries;  // of a step: floor(kRows / G)
  CUtensorMap q;         // boxes of 64 columns, G heads, one token
  CUtensorMap grad_out;
  CUtensorMap k;  // boxes of 64 columns, one head, 64 tokens
  CUtensorMap v;
};

// What a warpgroup does.
struct SelectedKeyItem {
  SequencePlace place;
  int32_t head_kv;
  int32_t first_key;
  int32_t count;  // keys; 0: nothing is left to do
  KeyPiece piece;
  const int32_t* list;   // queries, counted through the batch
  int32_t handed_begin;  // where scores of the batch's first query go, in units of 32 bytes
};

template <typename Shape>
struct SelectedBackwardKeysShared {
  struct Part {
    alignas(1024) typename Shape::Element k[Shape::KTile::kSize];
    alignas(1024) typename Shape::Element v[Shape::VTile::kSize];
    RowRing<Shape> ring;
    int32_t handed_at[Shape::kStages][Shape::kRows];  // where a row's scores go, in units of 32 bytes; below 0: nowhere
    int32_t handed_keys[Shape::kStages];              // that exist
    Barrier keys_full, keys_empty;
    // Filled by the warp that copies; drained by the warp of numbers and the consumers.
    Barrier item_full[2], item_empty[2];
    SelectedKeyItem items[2];
    KeyGradientsPlace places[2];
    uint32_t number_of_warp[kWarpgroup / 32];

    __device__ void init_barriers() {
      ring.init_barriers(1);
      init_barrier(&keys_full, 1);
      init_barrier(&keys_empty, kWarpgroup / 32);
      for (uint32_t& number : number_of_warp) {
        number = 0;
      }
      for (int i = 0; i < 2; ++i) {
        init_barrier(&item_full[i], 1);
        init_barrier(&item_empty[i], 32 + kWarpgroup);
      }
    }
  };
  Part parts[2];
};

// Takes pieces, by a warp, in their order. A piece that waits until another has been added waits for one that was taken
// before it. The first that is not done yet waits for none, so that the waiting ends.
struct KeyPieceTaker {
  int32_t head;        // that the last piece was of
  int32_t before = 0;  // pieces of the launch's earlier heads

  // Null when none is left.
  __device__ const KeyPiece* take(const SelectedBackwardKeysSm90Params& params, int lane) {
    const KeyPieces& pieces = params.selected.chosen_by.pieces;
    int32_t taken = 0;
    if (lane == 0) {
      taken = atomicAdd(params.taken, 1);
    }
    taken = __shfl_sync(0xffffffffu, taken, 0);
    for (; head < params.end_head; ++head) {
      const int32_t of_head = pieces.counts[head];
      if (taken - before < of_head) {
        return pieces.pieces + head * pieces.most_pieces + (taken - before);
      }
      before += of_head;
    }
    return nullptr;
  }
};

__device__ inline void write_item(const SelectedBackwardKeysSm90Params& params, const KeyPiece* piece,
                                  SelectedKeyItem& item, KeyGradientsPlace& to_place) {
  if (piece == nullptr) {
    item.count = 0;
    return;
  }
  const SelectedBackwardParams& selected = params.selected;
  const ChosenBy& chosen_by = selected.chosen_by;
  const SequenceLayout& s = selected.sequences;
  const SequencePlace place = place_of(s, piece->sequence);
  const int32_t first_key = piece->block * 64;
  const int32_t count = min(place.k_length - first_key, 64);
  item = {.place = place,
          .head_kv = piece->head_kv,
          .first_key = first_key,
          .count = count,
          .piece = *piece,
          .list = chosen_by.queries + piece->first,
          .handed_begin =
              static_cast<int32_t>((piece->head_kv - selected.handed.first_head) * selected.handed.queries *
                                   static_cast<int64_t>(chosen_by.ranks.divisor) * HandedScores::units(s.group))};
  to_place = {.first_key = first_key,
              .count = count,
              .batch = static_cast<int32_t>(place.batch),
              .to_token = static_cast<int32_t>(place.q_begin) - place.offset,
              .first_head = piece->head_kv * s.group};
}

template <typename Shape>
__device__ inline void copy_keys(const SelectedBackwardKeysSm90Params& params,
                                 typename SelectedBackwardKeysShared<Shape>::Part& part, const SelectedKeyItem& item,
                                 uint32_t number, int lane) {
  wait(&part.keys_empty, number % 2 ^ 1);
  if (lane != 0) {
    return;
  }
  arrive_expecting(&part.keys_full, Shape::kKeyBytes);
  const auto batch = static_cast<int32_t>(item.place.batch);
  const int32_t key = static_cast<int32_t>(item.place.k_begin) + item.first_key;
  for (int panel = 0; panel < Shape::KTile::kPanels; ++panel) {
    copy_box(part.k + panel * Shape::KTile::kPanelSize, &params.k, &part.keys_full, 64 * panel, item.head_kv, key,
             batch, kEvictNormal);
  }
  for (int panel = 0; panel < Shape::VTile::kPanels; ++panel) {
    copy_box(part.v + panel * Shape::VTile::kPanelSize, &params.v, &part.keys_full, 64 * panel, item.head_kv, key,
             batch, kEvictNormal);
  }
}

// Of the warp's piece `number`.
template <typename Shape>
__device__ inline void copy_chosen_rows(const SelectedBackwardKeysSm90Params& params,
                                        typename SelectedBackwardKeysShared<Shape>::Part& part,
                                        RingPlace<Shape::kStages>& ring_place, uint32_t number) {
  using QTile = typename Shape::QTile;
  using GradOutTile = typename Shape::GradOutTile;
  constexpr int kPanels = QTile::kPanels + GradOutTile::kPanels;
  constexpr int kMostBoxes = 2;  // of a lane: four heads or more fill a box
  const int lane = fresh_thread() % 32;
  const SelectedKeyItem& item = part.items[number % 2];
  const SequenceLayout& s = params.selected.sequences;
  const int32_t batch = static_cast<int32_t>(item.place.batch);
  const int32_t head = item.head_kv * s.group;

  // The lane's boxes: of which of a step's queries, and where they go.
  const int32_t to_token = static_cast<int32_t>(-item.place.batch * s.length_q);
  const int32_t* const list = item.list;
  const int32_t queries = item.piece.queries;
  const auto index_of = [&](int box) { return (lane + 32 * box) / kPanels; };
  const auto query_at = [&](int32_t end, int box) {
    return static_cast<int32_t>(
        params.selected.chosen_by.ranks.divide(static_cast<uint32_t>(list[max(end - 1 - index_of(box), 0)])));
  };
  RowRing<Shape>& ring = part.ring;
  int32_t next[kMostBoxes];
  if (queries > 0) {
#pragma unroll
    for (int box = 0; box < kMostBoxes; ++box) {
      next[box] = query_at(queries, box);
    }
  }
  const uint32_t bytes = params.step_queries * s.group * (Shape::kDimK + Shape::kDimV) * 2;
  // The last piece's keys are read until its last step is done, which frees this step's stage.
  const int32_t step_of_keys = queries - (Shape::kStages - 1) * params.step_queries;
  if (step_of_keys <= 0) {
    copy_keys<Shape>(params, part, item, number, lane);
  }
  for (int32_t end = queries; end > 0; end -= params.step_queries) {
    const int stage = ring_place.stage;
    Barrier* const full = &ring.full[stage];
    int32_t query[kMostBoxes];
#pragma unroll
    for (int box = 0; box < kMostBoxes; ++box) {
      query[box] = next[box];
      next[box] = query_at(end - params.step_queries, box);
    }
    if (end == step_of_keys) {
      copy_keys<Shape>(params, part, item, number, lane);
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

// By one warp: takes pieces until none is left.
template <typename Shape>
__device__ inline void copy_chosen(const SelectedBackwardKeysSm90Params& params,
                                   typename SelectedBackwardKeysShared<Shape>::Part& part) {
  if (fresh_thread() % 32 == 0) {
    prefetch_map(&params.q);
    prefetch_map(&params.grad_out);
  }
  KeyPieceTaker taker{.head = params.first_head};
  RingPlace<Shape::kStages> ring_place;
  for (uint32_t number = 0;; ++number) {
    const KeyPiece* const piece = taker.take(params, fresh_thread() % 32);
    wait(&part.item_empty[number % 2], number / 2 % 2 ^ 1);
    if (fresh_thread() % 32 == 0) {
      write_item(params, piece, part.items[number % 2], part.places[number % 2]);
      arrive(&part.item_full[number % 2]);
    }
    __syncwarp();
    if (piece == nullptr) {
      return;
    }
    copy_chosen_rows<Shape>(params, part, ring_place, number);
  }
}

// Of one piece.
template <typename Shape>
__device__ inline void gather_chosen_numbers(const SelectedBackwardKeysSm90Params& params,
                                             typename SelectedBackwardKeysShared<Shape>::Part& part,
                                             const SelectedKeyItem& item, RingPlace<Shape::kStages>& ring_place,
                                             int lane) {
  constexpr int kPerLane = (Shape::kRows + 31) / 32;
  const SelectedBackwardParams& selected = params.selected;
  const SequencePlace& place = item.place;
  const SequenceLayout& s = selected.sequences;
  const int32_t to_token = static_cast<int32_t>(-place.batch * s.length_q);
  const int32_t to_position = static_cast<int32_t>(place.offset - place.q_begin);
  const int32_t* const list = item.list;
  const int32_t queries = item.piece.queries;
  RowRing<Shape>& ring = part.ring;
  int32_t next[kPerLane];  // the row's query in the next step
  const Divisor& ranks = selected.chosen_by.ranks;
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
      const int32_t head = item.head_kv * s.group + at.head;
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
        part.handed_at[stage][row] = handed_at[i];
      }
    }
    if (lane == 0) {
      part.handed_keys[stage] = item.count;
    }
    arrive(&ring.full[stage]);
    ring_place.advance();
  }
}

template <typename Shape>
__device__ inline void gather_numbers(const SelectedBackwardKeysSm90Params& params,
                                      typename SelectedBackwardKeysShared<Shape>::Part& part, int lane) {
  RingPlace<Shape::kStages> ring_place;
  for (uint32_t number = 0;; ++number) {
    const SelectedKeyItem& item = part.items[number % 2];
    wait(&part.item_full[number % 2], number / 2 % 2);
    if (item.count == 0) {
      return;
    }
    gather_chosen_numbers<Shape>(params, part, item, ring_place, lane);
    arrive(&part.item_empty[number % 2]);
  }
}

}  // namespace nsa
