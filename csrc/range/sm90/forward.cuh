// Attention over a range of keys, forward, for Hopper: O = softmax(scale Q K^T) V over the keys that each row sees.
//
// A block of threads walks many tiles of rows, the longest first. Its shared memory holds Q of one or two tiles, two
// stages of K and of V, the output of the last tile, and what tiles are (forward_tiles.cuh). A warpgroup of helpers
// lists tiles, copies in (feed.cuh) and out (write.cuh) for warpgroups of 64 rows each, which share K and V.
//
// A warpgroup's step j starts S_j = Q K_j^T and O += P_{j-1} V_{j-1}, and takes the softmax of S_j while the second
// product runs. Warpgroups take turns at starting products: the softmax of one runs under the products of the others.
// A tile's last product runs beside the first one of the next tile, so that tiles follow each other as steps do.
#pragma once

#include "common/sm90/softmax.cuh"
#include "range/sm90/feed.cuh"
#include "range/sm90/write.cuh"

namespace nsa {

// A warpgroup that consumes: 64 rows of each tile. What follows from counters is computed anew each time, as registers
// lack to keep it.
template <typename Shape>
struct RangeConsumer {
  using Element = typename Shape::Element;
  using VTile = typename Shape::VTile;
  static constexpr int kKeys = Shape::kKeys;
  static constexpr int kConsumers = Shape::kConsumers;

  const RangeForwardSm90Params& params;
  typename Shape::Shared& shared;
  const int number;
  uint32_t tiles = 0;       // taken
  uint32_t seen = 0;        // of these, with keys
  uint32_t steps = 0;       // whose scores are taken; sums lag behind by one
  int32_t key = 0;          // the step's first
  bool unfinished = false;  // the tile before lacks one product of its sums
  bool add = false;         // to the tile's sums
  float out[Shape::kDimV / 8][4];
  float scores[kKeys / 8][4];
  uint32_t weights[kKeys / 16][4] = {};
  float factors[2];
  RunningSoftmax<1> softmax;

  __device__ RangeConsumer(const RangeForwardSm90Params& params_, typename Shape::Shared& shared_, int number_)
      : params(params_), shared(shared_), number(number_) {}

  __device__ void walk() {
    if (number == kConsumers - 1) {
      pass_turn();
    }
    clear(out);
#pragma unroll 1
    while (true) {
      if (unfinished) {
        finish_tile_before();
      }
      wait(&shared.tile_full[Shape::TilePlace::of(tiles).stage], Shape::TilePlace::of(tiles).parity);
      if (take_first_step()) {
        take_other_steps();
        ++seen;
        ++tiles;
        continue;
      }
      const RangeTile& unseen = tile();
      if (unseen.first_row > unseen.last_row) {
        return;
      }
      write_unseen_rows<Element>(params, unseen, consumer());
      arrive(&shared.tile_empty[Shape::TilePlace::of(tiles).stage]);
      ++tiles;
    }
  }

  // Steps.

  // A tile's first, which starts the last sums of the tile before. Returns whether there is a key.
  __device__ bool take_first_step() {
    const RangeTile& first_of = tile();
    key = first_of.begin;
    int more = key < first_of.end ? 1 : 0;
    asm volatile("" : "+r"(more));  // or both sides of the comparison are kept
    if (more != 0) {
      wait(&shared.q_full[Shape::QPlace::of(seen).stage], Shape::QPlace::of(seen).parity);
      await_k();
      await_turn();
    }
    // One of these products is for nothing where there is no tile before, or no key: a branch around it would make the
    // compiler wait for each.
    start_scores();
    start_sums();
    if (more != 0) {
      pass_turn();
    }
    wait_products<1>();
    hold(scores);
    if (more != 0) {
      release_k(key + kKeys >= first_of.end);
      mask(first_of);
      softmax = RunningSoftmax<1>();
      float none[2];
      softmax.weigh(0, scores, none, params.scale_log2);
    }
    wait_products<0>();
    hold(out);
    take_weights();
    if (unfinished) {
      release_v();
      stage_output();
      arrive(&shared.tile_empty[Shape::TilePlace::of(tiles - 1).stage]);
    }
    unfinished = more != 0;
    return unfinished;
  }

  __device__ void take_other_steps() {
    ++steps;
    add = false;
#pragma unroll 1
    while (key + kKeys < tile().end) {
      const RangeTile& now = tile();
      key += kKeys;
      await_k();
      await_turn();
      start_scores();
      await_v();
      start_sums();
      pass_turn();
      add = true;
      wait_products<1>();
      hold(scores);
      release_k(key + kKeys >= now.end);
      mask(now);
      const bool rises =
          weigh_lazily(softmax, scores, params.scale_log2, [&](int half, float factor) { factors[half] = factor; });
      wait_products<0>();
      hold(out);
      release_v();
      if (rises) {
        softmax.rescale(out, factors);
      }
      take_weights();
      ++steps;
    }
  }

  __device__ void finish_tile_before() {
    const RangeTile& before = shared.tiles[Shape::TilePlace::of(tiles - 1).stage];
    finish_softmax(before);
    await_v();
    clear_values_beyond(before.length - key);
  }

  // Barriers.

  __device__ int consumer() const {
    int copy = number;
    asm volatile("" : "+r"(copy));
    return copy;
  }
  __device__ const RangeTile& tile() const { return shared.tiles[Shape::TilePlace::of(tiles).stage]; }
  __device__ void await_turn() const { sync_threads(kTurnBarrier + consumer(), 2 * kWarpgroup); }
  __device__ void pass_turn() const { arrive_threads(kTurnBarrier + (consumer() + 1) % kConsumers, 2 * kWarpgroup); }
  __device__ void await_k() const {
    wait(&shared.k_full[Shape::KeysPlace::of(steps).stage], Shape::KeysPlace::of(steps).parity);
  }
  __device__ void await_v() const {
    wait(&shared.v_full[Shape::KeysPlace::of(steps - 1).stage], Shape::KeysPlace::of(steps - 1).parity);
  }
  __device__ static void release(Barrier* barrier) {
    if (fresh_thread() % 32 == 0) {
      arrive(barrier);
    }
  }
  __device__ void release_k(bool last) const {
    release(&shared.k_empty[Shape::KeysPlace::of(steps).stage]);
    if (last) {
      release(&shared.q_empty[Shape::QPlace::of(seen).stage]);
    }
  }
  __device__ void release_v() const { release(&shared.v_empty[Shape::KeysPlace::of(steps - 1).stage]); }

  // Scores, mask and softmax.

  __device__ void start_scores() {
    const uint64_t q = tile_descriptor(shared_address(shared.q[Shape::QPlace::of(seen).stage][consumer()]), 0);
    const uint64_t k = tile_descriptor(shared_address(shared.k[Shape::KeysPlace::of(steps).stage]), 0);
    start_product<typename Shape::QTile, typename Shape::KTile>(scores, q, k);
  }
  __device__ void mask(const RangeTile& now) {
    if (key >= now.all_begin && key + kKeys <= now.all_end) {
      return;
    }
    const int thread = fresh_thread() % kWarpgroup;
    const int32_t row = now.first_row + consumer() * params.consumer_rows + thread / 32 * 16 + thread % 32 / 4;
    const Visibility& visibility = params.range.visibility;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int32_t position = now.offset + row_at(params.range.sequences, 0, row + 8 * half).query;
      if (key < now.all_begin) {
        drop_columns<false>(scores, half, visibility.begin(position) - key, thread % 32);
      }
      if (key + kKeys > now.all_end) {
        drop_columns<true>(scores, half, min(visibility.end(position), now.length) - key, thread % 32);
      }
    }
  }
  // The factors that end the sums of a tile; lse leaves.
  __device__ void finish_softmax(const RangeTile& before) {
    const int thread = fresh_thread() % kWarpgroup;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const SoftmaxResult result = softmax.finish(0, half, params.scale_log2);
      factors[half] = result.factor;
      const int own_row = thread / 32 * 16 + thread % 32 / 4 + 8 * half;
      const int32_t at_row = before.first_row + consumer() * params.consumer_rows + own_row;
      if (thread % 4 == 0 && own_row < params.consumer_rows && at_row <= before.last_row) {
        const Row at = row_at(params.range.sequences, before.head_kv, at_row);
        params.range.lse.at(before.batch, at.head, int64_t{before.first_token} + at.query) = result.lse;
      }
    }
  }

  // Sums.

  __device__ void take_weights() {
#pragma unroll
    for (int i = 0; i < kKeys / 16; ++i) {
      as_left<Element>(weights[i], scores, i);
    }
  }
  // Unless they are added, these are a tile's first, and what was in `out` before is lost.
  __device__ void start_sums() {
    const uint64_t v = tile_descriptor(shared_address(shared.v[Shape::KeysPlace::of(steps - 1).stage]),
                                       VTile::kPanelSize * static_cast<int>(sizeof(Element)));
    hold(out);
    fence_products();
#pragma unroll
    for (int i = 0; i < kKeys / 16; ++i) {
      multiply_async<Element>(out, weights[i], advance(v, 2 * 64 * 16 * i), add || i != 0);
    }
    commit_products();
  }
  // Nobody's weight of a row past the end is other than 0, but 0 times what lies there may be NaN.
  __device__ void clear_values_beyond(int32_t rows) const {
    if (rows < kKeys) {
      clear_rows_from<VTile>(shared.v[Shape::KeysPlace::of(steps - 1).stage], rows, kConsumerBarrier + consumer());
    }
  }

  // Store.

  // Rounds the output of the last tile seen into shared memory.
  __device__ void stage_output() {
    const int thread = fresh_thread() % kWarpgroup;
    const int first_row = thread / 32 * 16;
    const int lane = thread % 32;
    const typename Shape::OutTile to{shared_address(shared.out[consumer()])};
    bool sums = false;
    if constexpr (Shape::kSums) {
      sums = params.range.sum.out != nullptr;
      if (sums) {
        wait(&shared.others_full, RingPlace<1>::of(seen - 1).parity);
        float gates[2][3];
#pragma unroll
        for (int i = 0; i < 6; ++i) {
          gates[i / 3][i % 3] = shared.gates[64 * consumer() + first_row + lane / 4 + 8 * (i / 3)][i % 3];
        }
        const typename Shape::OutTile selected{shared_address(shared.q[Shape::QPlace::of(seen - 1).stage][consumer()])};
        stage_gated_rows<Element>(to, selected, out, factors, gates, first_row, lane);
      }
    }
    if (!sums) {
      wait(&shared.out_empty, RingPlace<1>::of(seen - 1).parity ^ 1);
      stage_rows<Element>(to, out, factors, first_row, lane);
    }
    fence_shared_writes();
    arrive(&shared.out_full);
  }
};

// Empty unless it is compiled for sm_90a: see runs_on_this_device.
template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    range_forward_sm90(const __grid_constant__ RangeForwardSm90Params params) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  auto& shared = shared_memory<typename Shape::Shared>();
  if (threadIdx.x == 0) {
    prefetch_map(&params.q);
    prefetch_map(&params.k);
    prefetch_map(&params.v);
    constexpr uint32_t kWarps = Shape::kConsumers * kWarpgroup / 32;
    init_ring(shared.q_full, shared.q_empty, 1, kWarps);
    init_ring(shared.k_full, shared.k_empty, 1, kWarps);
    init_ring(shared.v_full, shared.v_empty, 1, kWarps);
    // Drained also by what feeds and stores.
    init_ring(shared.tile_full, shared.tile_empty, 1, Shape::kConsumers * kWarpgroup + 1 + 32);
    init_barrier(&shared.others_full, 1 + 32);
    init_barrier(&shared.out_full, Shape::kConsumers * kWarpgroup);
    init_barrier(&shared.out_empty, 32);
    fence_barrier_init();
  }
  __syncthreads();
  const auto feed = [&] {
    if (threadIdx.x == 0) {
      RangeProducer<Shape>(params, shared).walk();
    } else if (threadIdx.x / 32 == 1) {
      list_range_tiles<Shape>(params, shared);
    } else if (threadIdx.x / 32 == 2) {
      store_range<Shape>(params, shared);
    }
  };
  split_warpgroups<Shape>(feed, [&](int consumer) { RangeConsumer<Shape>(params, shared, consumer).walk(); });
#endif
}

}  // namespace nsa
