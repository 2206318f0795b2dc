// Attention over a range of keys, forward, for Hopper. As forward_sm80.cuh, but a producer warp feeds K and V to
// warpgroups of 64 rows each, which share them. A block walks many tiles of rows, the longest first, so that the copies
// for one tile run during the end of the one before.
//
// A warpgroup's step j starts S_j = Q K_j^T and O += P_{j-1} V_{j-1}, and takes the softmax of S_j while the second
// product runs. Warpgroups take turns at starting products: the softmax of one runs under the products of the others.
#pragma once

#include "attention/range_sm90.cuh"

namespace nsa {

template <typename Shape>
__device__ inline void produce_range(const RangeForwardSm90Params& params, typename Shape::Shared& shared) {
  using Element = typename Shape::Element;
  prefetch_map(&params.q);
  prefetch_map(&params.k);
  prefetch_map(&params.v);
  RingPlace<Shape::kStages> k_place;
  RingPlace<Shape::kStages> v_place;
  uint32_t q_parity = 0;
  for_each_range_tile(params, Shape::kConsumers * params.consumer_rows, [&](const RangeTile& tile) {
    const SequencePlace& place = tile.place;
    const int32_t batch = static_cast<int32_t>(place.batch);
    const auto copy_keys = [&]<typename Panel>(Panel, const CUtensorMap& map, Element* to, Barrier* full,
                                               Barrier* empty, uint32_t parity, int32_t key) {
      wait(empty, parity ^ 1);
      arrive_expecting(full, Panel::kSize * sizeof(Element));
#pragma unroll
      for (int panel = 0; panel < Panel::kPanels; ++panel) {
        copy_box(to + panel * Panel::kPanelSize, &map, full, 64 * panel, tile.head_kv,
                 static_cast<int32_t>(tile.keys.begin) + key, batch, kEvictLast);
      }
    };
    const auto copy_k = [&](int32_t key) {
      const int stage = k_place.stage;
      copy_keys(typename Shape::KTile(), params.k, shared.k[stage], &shared.k_full[stage], &shared.k_empty[stage],
                k_place.parity, key);
      k_place.advance();
    };
    const auto copy_v = [&](int32_t key) {
      const int stage = v_place.stage;
      copy_keys(typename Shape::VTile(), params.v, shared.v[stage], &shared.v_full[stage], &shared.v_empty[stage],
                v_place.parity, key);
      v_place.advance();
    };
    if (tile.begin >= tile.end) {
      return;
    }
    copy_k(tile.begin);
    const Sequences& s = params.range.sequences;
    for (int i = 0; i < Shape::kConsumers; ++i) {
      wait(&shared.q_empty[i], q_parity ^ 1);
      arrive_expecting(&shared.q_full[i], params.consumer_bytes);
      const int32_t token =
          static_cast<int32_t>(place.q_begin) + row_at(s, 0, tile.first_row + params.consumer_rows * i).query;
#pragma unroll
      for (int panel = 0; panel < Shape::QTile::kPanels; ++panel) {
        copy_box(shared.q[i] + panel * Shape::QTile::kPanelSize, &params.q, &shared.q_full[i], 64 * panel,
                 tile.head_kv * s.group, token, batch, kEvictFirst);
      }
    }
    q_parity ^= 1;
    for (int32_t key = tile.begin; key < tile.end; key += Shape::kKeys) {
      if (key + Shape::kKeys < tile.end) {
        copy_k(key + Shape::kKeys);
      }
      copy_v(key);
    }
  });
}

// Writes one of the lane's two rows, times `factor`: the four lanes of a row trade their pairs of columns for chunks of
// 16 bytes. `to` is where the row begins, or null.
template <typename Element, int kTiles>
__device__ inline void write_row(Element* to, int32_t width, const float (&c)[kTiles][4], int half, float factor,
                                 int lane) {
#pragma unroll
  for (int i = 0; i < kTiles; i += 4) {
    uint32_t words[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      words[j] = pack<Element>(c[i + j][2 * half] * factor, c[i + j][2 * half + 1] * factor);
    }
#pragma unroll
    for (int bit = 1; bit <= 2; bit *= 2) {
      const bool upper = (lane & bit) != 0;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if ((j & bit) == 0) {
          const uint32_t got = __shfl_xor_sync(0xffffffffu, upper ? words[j] : words[j | bit], bit);
          (upper ? words[j] : words[j | bit]) = got;
        }
      }
    }
    const int column = 8 * (i + lane % 4);
    if (to != nullptr && column < width) {
      *reinterpret_cast<uint4*>(to + column) = make_uint4(words[0], words[1], words[2], words[3]);
    }
  }
}

template <typename Shape>
__device__ inline void consume_range(const RangeForwardSm90Params& params, typename Shape::Shared& shared,
                                     int consumer) {
  using Element = typename Shape::Element;
  using QTile = typename Shape::QTile;
  using KTile = typename Shape::KTile;
  using VTile = typename Shape::VTile;
  constexpr int kKeys = Shape::kKeys;
  constexpr int kNext = Shape::kConsumers;
  const RangeForwardParams& range = params.range;
  const Sequences& s = range.sequences;
  const int thread = static_cast<int>(threadIdx.x) % kWarpgroup;
  const int lane = thread % 32;
  const int own_row = thread / 32 * 16 + lane / 4;  // of the consumer's, and the eighth after it
  const int row = consumer * params.consumer_rows + own_row;

  const auto release = [&](Barrier* barrier) {
    if (lane == 0) {
      arrive(barrier);
    }
  };
  const auto await_turn = [&] { sync_threads(kTurnBarrier + consumer, 2 * kWarpgroup); };
  const auto pass_turn = [&] { arrive_threads(kTurnBarrier + (consumer + 1) % kNext, 2 * kWarpgroup); };
  if (consumer == kNext - 1) {
    pass_turn();
  }

  const float scale_log2 = range.scale * kLog2E;
  const uint64_t q_at = tile_descriptor(shared_address(shared.q[consumer]), 0);
  const uint64_t k_at = tile_descriptor(shared_address(shared.k), 0);
  const uint64_t v_at = tile_descriptor(shared_address(shared.v), VTile::kPanelSize * sizeof(Element));
  RingPlace<Shape::kStages> k_place;
  RingPlace<Shape::kStages> v_place;
  uint32_t q_parity = 0;

  for_each_range_tile(params, Shape::kConsumers * params.consumer_rows, [&](const RangeTile& tile) {
    float out[Shape::kDimV / 8][4];
    clear(out);
    RunningSoftmax<1> softmax;

    if (tile.begin < tile.end) {
      const int32_t offset = tile.place.offset;
      // Keys in [all_begin, all_end) are seen by every row.
      const int32_t all_begin = range.visibility.begin(offset + row_at(s, 0, tile.last_row).query);
      const int32_t all_end = min(range.visibility.end(offset + row_at(s, 0, tile.first_row).query), tile.keys.length);
      float scores[kKeys / 8][4];
      uint32_t weights[kKeys / 16][4];
      float factors[2];

      const auto start_scores = [&] {
        const uint64_t k = advance(k_at, k_place.stage * KTile::kSize * static_cast<int>(sizeof(Element)));
        hold(scores);
        fence_products();
#pragma unroll
        for (int column = 0; column < Shape::kDimK; column += 16) {
          const int panel = column / 64;
          const int inside = column % 64;
          multiply_async<Element>(scores, advance(q_at, 2 * (panel * QTile::kPanelSize + inside)),
                                  advance(k, 2 * (panel * KTile::kPanelSize + inside)), column != 0);
        }
        commit_products();
      };
      const auto start_sums = [&] {
        const uint64_t v = advance(v_at, v_place.stage * VTile::kSize * static_cast<int>(sizeof(Element)));
        hold(out);
        fence_products();
#pragma unroll
        for (int i = 0; i < kKeys / 16; ++i) {
          multiply_async<Element>(out, weights[i], advance(v, 2 * 64 * 16 * i), true);
        }
        commit_products();
      };
      const auto take_weights = [&] {
#pragma unroll
        for (int i = 0; i < kKeys / 16; ++i) {
          as_left<Element>(weights[i], scores, i);
        }
      };
      const auto mask = [&](int32_t key) {
        if (key < all_begin || key + kKeys > all_end) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int32_t position = offset + row_at(s, 0, tile.first_row + row + 8 * half).query;
            const int32_t low = range.visibility.begin(position) - key;
            const int32_t high = min(range.visibility.end(position), tile.keys.length) - key;
            keep_range(scores, half, low, high, lane);
          }
        }
      };
      const auto release_k = [&](bool last) {
        release(&shared.k_empty[k_place.stage]);
        k_place.advance();
        if (last) {
          release(&shared.q_empty[consumer]);
        }
      };
      const auto release_v = [&] {
        release(&shared.v_empty[v_place.stage]);
        v_place.advance();
      };

      wait(&shared.q_full[consumer], q_parity);
      q_parity ^= 1;
      wait(&shared.k_full[k_place.stage], k_place.parity);
      start_scores();
      wait_products<0>();
      hold(scores);
      release_k(tile.begin + kKeys >= tile.end);
      mask(tile.begin);
      softmax.weigh(0, scores, factors, scale_log2);
      take_weights();

#pragma unroll 1
      for (int32_t key = tile.begin + kKeys; key < tile.end; key += kKeys) {
        wait(&shared.k_full[k_place.stage], k_place.parity);
        await_turn();
        start_scores();
        wait(&shared.v_full[v_place.stage], v_place.parity);
        start_sums();
        pass_turn();
        wait_products<1>();
        hold(scores);
        release_k(key + kKeys >= tile.end);
        mask(key);
        softmax.weigh(0, scores, factors, scale_log2);
        wait_products<0>();
        hold(out);
        release_v();
        softmax.rescale(out, factors);
        take_weights();
      }

      // Nobody's weight of a row past the end is other than 0, but 0 times what lies there may be NaN.
      wait(&shared.v_full[v_place.stage], v_place.parity);
      const int32_t beyond = (tile.end - tile.begin - 1) % kKeys + 1;
      if (beyond < kKeys) {
#pragma unroll 1
        for (int i = 8 * beyond + thread; i < 8 * kKeys; i += kWarpgroup) {
#pragma unroll
          for (int panel = 0; panel < VTile::kPanels; ++panel) {
            Element* chunk = shared.v[v_place.stage] + panel * VTile::kPanelSize + 8 * i;
            *reinterpret_cast<uint4*>(chunk) = uint4{};
          }
        }
        fence_shared_writes();
        sync_threads(kConsumerBarrier + consumer, kWarpgroup);
      }
      start_sums();
      wait_products<0>();
      hold(out);
      release_v();
    }

#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int32_t at_row = tile.first_row + row + 8 * half;
      const SoftmaxResult result = softmax.finish(0, half, scale_log2);
      Element* to = nullptr;
      if (own_row + 8 * half < params.consumer_rows && at_row <= tile.last_row) {
        const Row at = row_at(s, tile.head_kv, at_row);
        to = range.out.row<Element>(tile.place.batch, tile.place.q_begin + at.query, at.head);
        if (lane % 4 == 0) {
          range.lse.at(tile.place.batch, at.head, tile.place.q_begin + at.query) = result.lse;
        }
      }
      write_row(to, range.out.width, out, half, result.factor, lane);
    }
  });
}

// Empty unless it is compiled for sm_90a: see runs_on_this_device.
template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    range_forward_sm90(const __grid_constant__ RangeForwardSm90Params params) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<typename Shape::Shared*>(shared_bytes);
  if (threadIdx.x == 0) {
    for (int i = 0; i < Shape::kConsumers; ++i) {
      init_barrier(&shared.q_full[i], 1);
      init_barrier(&shared.q_empty[i], kWarpgroup / 32);
    }
    for (int i = 0; i < Shape::kStages; ++i) {
      init_barrier(&shared.k_full[i], 1);
      init_barrier(&shared.k_empty[i], Shape::kConsumers * kWarpgroup / 32);
      init_barrier(&shared.v_full[i], 1);
      init_barrier(&shared.v_empty[i], Shape::kConsumers * kWarpgroup / 32);
    }
    fence_barrier_init();
  }
  __syncthreads();
  const int warpgroup = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / kWarpgroup, 0);
  if (warpgroup == 0) {
    shrink_registers<Shape::kProducerRegisters>();
    if (threadIdx.x == 0) {
      produce_range<Shape>(params, shared);
    }
  } else {
    grow_registers<Shape::kConsumerRegisters>();
    consume_range<Shape>(params, shared, warpgroup - 1);
  }
#endif
}

}  // namespace nsa
