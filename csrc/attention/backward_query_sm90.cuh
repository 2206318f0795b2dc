// Attention over a range of keys, backward, for Hopper: the gradient of q. As backward_query_sm80.cuh:
//   P = exp(scale Q K^T - lse),   dS = P (dO V^T - delta),   dQ = scale gate dS K
// A producer warp feeds K and V to warpgroups of 64 rows each, which share them; one block of threads stays on each
// multiprocessor and walks tiles of rows, the longest first (attention/query_sm90.cuh).
//
// A warpgroup's step j starts dQ += dS_{j-1} K_{j-1}, S_j = Q K_j^T and dO V_j^T, one after the other, and turns S_j
// into P while the last one runs. dS stays in registers, as the left operand; K is the right operand of two products,
// once by rows and once by columns. Warpgroups take turns at starting products.
#pragma once

#include "attention/query_sm90.cuh"
#include "common/tile.cuh"

namespace nsa {

namespace grad_q {

// To the L2 cache: a box of a tensor, a line.
__device__ inline void prefetch_box(const CUtensorMap* map, int32_t column, int32_t head, int32_t token,
                                    int32_t batch) {
  asm volatile("cp.async.bulk.prefetch.tensor.4d.L2.global [%0, {%1, %2, %3, %4}];\n" ::"l"(map), "r"(column),
               "r"(head), "r"(token), "r"(batch)
               : "memory");
}
__device__ inline void prefetch_line(const void* address) {
  asm volatile("prefetch.global.L2 [%0];\n" ::"l"(address) : "memory");
}

// Copies K and V of all tiles, in the order in which consumers want them.
template <typename Shape>
__device__ inline void produce_keys(const RangeBackwardQuerySm90Params& params, typename Shape::Shared& shared) {
  using Element = typename Shape::Element;
  prefetch_map(&params.k);
  prefetch_map(&params.v);
  Place<Shape::kKStages> k_place;
  Place<Shape::kVStages> v_place;
  for_each_row_tile(params, Shape::kConsumers * params.consumer_rows, [&](const RowTile& tile) {
    const auto copy = [&]<typename Panel>(Panel, const CUtensorMap& map, Element* to, Barrier* full, Barrier* empty,
                                          uint32_t parity, int32_t key) {
      wait(empty, parity ^ 1);
      arrive_expecting(full, Panel::kSize * sizeof(Element));
#pragma unroll
      for (int panel = 0; panel < Panel::kPanels; ++panel) {
        copy_box(to + panel * Panel::kPanelSize, &map, full, 64 * panel, tile.head_kv,
                 static_cast<int32_t>(tile.keys.begin) + key, static_cast<int32_t>(tile.place.batch), kEvictLast);
      }
    };
    for (int32_t key = tile.begin; key < tile.end; key += Shape::kKeys) {
      copy(typename Shape::KTile(), params.k, shared.k[k_place.stage], &shared.k_full[k_place.stage],
           &shared.k_empty[k_place.stage], k_place.parity, key);
      k_place.advance();
      copy(typename Shape::VTile(), params.v, shared.v[v_place.stage], &shared.v_full[v_place.stage],
           &shared.v_empty[v_place.stage], v_place.parity, key);
      v_place.advance();
    }
  });
}

// Copies Q and dO of all tiles: slots go round, one for each consumer of each tile. What else a consumer reads of its
// rows comes to the L2 cache meanwhile. By a warp.
template <typename Shape>
__device__ inline void produce_rows(const RangeBackwardQuerySm90Params& params, typename Shape::Shared& shared) {
  using Element = typename Shape::Element;
  Place<Shape::kRowSlots> slot;
  const RangeBackwardParams& range = params.range;
  const Sequences& s = range.sequences;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for_each_row_tile(params, Shape::kConsumers * params.consumer_rows, [&](const RowTile& tile) {
    if (tile.begin >= tile.end) {
      return;
    }
    const int32_t batch = static_cast<int32_t>(tile.place.batch);
    for (int i = 0; i < Shape::kConsumers; ++i) {
      const int32_t first_row = tile.first_row + params.consumer_rows * i;
      const int32_t token = static_cast<int32_t>(tile.place.q_begin) + row_at(s, 0, first_row).query;
      Barrier* const full = &shared.rows_full[slot.stage];
      wait(&shared.rows_empty[slot.stage], slot.parity ^ 1);
      if (lane == 0) {
        const auto copy = [&]<typename Panel>(Panel, const CUtensorMap& map, Element* to) {
#pragma unroll
          for (int panel = 0; panel < Panel::kPanels; ++panel) {
            copy_box(to + panel * Panel::kPanelSize, &map, full, 64 * panel, tile.head_kv * s.group, token, batch,
                     kEvictFirst);
          }
        };
        arrive_expecting(full, params.consumer_bytes);
        copy(typename Shape::QTile(), params.q, shared.q[slot.stage]);
        copy(typename Shape::GradOutTile(), params.grad_out, shared.grad_out[slot.stage]);
        if ((Shape::kPrefetch & 1) != 0 && range.add_to_grad_q) {
#pragma unroll
          for (int panel = 0; panel < Shape::QTile::kPanels; ++panel) {
            prefetch_box(&params.grad_q, 64 * panel, tile.head_kv * s.group, token, batch);
          }
        }
      }
      if ((Shape::kPrefetch & 2) != 0) {
        for (int row = first_row + lane; row < first_row + params.consumer_rows && row <= tile.last_row; row += 32) {
          const Row at = row_at(s, tile.head_kv, row);
          const int64_t of_token = tile.place.q_begin + at.query;
          prefetch_line(&range.lse.at(batch, at.head, of_token));
          prefetch_line(&range.delta.at(batch, at.head, of_token));
        }
      }
      slot.advance();
    }
  });
}

// Sets columns outside [low, high) of one of the lane's two rows to 0.
template <int kTiles>
__device__ inline void clear_outside(float (&c)[kTiles][4], int half, int32_t low, int32_t high, int lane) {
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int32_t column = 8 * i + 2 * (lane % 4) + j;
      if (column < low || column >= high) {
        c[i][2 * half + j] = 0.f;
      }
    }
  }
}

// Rows leave in chunks of 16 bytes, every fourth of them by the same of a row's four lanes.
__device__ inline int column_of_chunk(int i, int lane) { return 8 * (4 * i + lane % 4); }

template <typename Element, int kChunks>
__device__ inline void read_row(uint4 (&chunks)[kChunks], const Element* from, int32_t width, int lane) {
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    const int column = column_of_chunk(i, lane);
    chunks[i] = column < width ? *reinterpret_cast<const uint4*>(from + column) : uint4{};
  }
}

// Writes one of the lane's two rows of an accumulator, times `factor`, plus `before` if `add`: lanes trade their pairs
// of columns for chunks. `to` may be null: then nothing is written.
template <typename Element, int kChunks>
__device__ inline void write_row_sum(Element* to, int32_t width, const float (&c)[4 * kChunks][4], int half,
                                     float factor, bool add, const uint4 (&before)[kChunks], int lane) {
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    uint32_t words[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      words[j] = pack<Element>(c[4 * i + j][2 * half] * factor, c[4 * i + j][2 * half + 1] * factor);
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
    uint4 chunk = make_uint4(words[0], words[1], words[2], words[3]);
    if (add) {
      chunk = add_chunks<Element>(chunk, before[i]);
    }
    const int column = column_of_chunk(i, lane);
    if (to != nullptr && column < width) {
      *reinterpret_cast<uint4*>(to + column) = chunk;
    }
  }
}

// c = a b, of two tiles' rows.
template <typename Left, typename Right, int kTiles>
__device__ inline void start_product(float (&c)[kTiles][4], uint64_t a, uint64_t b) {
  hold(c);
  fence_products();
#pragma unroll
  for (int column = 0; column < Left::kColumns; column += 16) {
    const int panel = column / 64;
    const int inside = column % 64;
    multiply_async<typename Left::Element>(c, advance(a, 2 * (panel * Left::kPanelSize + inside)),
                                           advance(b, 2 * (panel * Right::kPanelSize + inside)), column != 0);
  }
  commit_products();
}

// c += a b for as many columns as c has: a product takes 128 of them, or 64.
template <typename Element, int kPanelBytes, int kTiles>
__device__ inline void multiply_columns(float (&c)[kTiles][4], const uint32_t (&a)[4], uint64_t b) {
  constexpr int kWide = kTiles / 16;
#pragma unroll
  for (int i = 0; i < kWide; ++i) {
    multiply_async<Element>(reinterpret_cast<float (&)[16][4]>(c[16 * i]), a, advance(b, 2 * kPanelBytes * i), true);
  }
  if constexpr (kTiles % 16 != 0) {
    multiply_async<Element>(reinterpret_cast<float (&)[8][4]>(c[16 * kWide]), a, advance(b, 2 * kPanelBytes * kWide),
                            true);
  }
}

template <typename Shape>
__device__ inline void consume(const RangeBackwardQuerySm90Params& params, typename Shape::Shared& shared,
                               int consumer) {
  using Element = typename Shape::Element;
  using QTile = typename Shape::QTile;
  using GradOutTile = typename Shape::GradOutTile;
  using KTile = typename Shape::KTile;
  using VTile = typename Shape::VTile;
  constexpr int kKeys = Shape::kKeys;
  constexpr int kBytes = sizeof(Element);
  constexpr int kPanelBytes = KTile::kPanelSize * kBytes;
  const RangeBackwardParams& range = params.range;
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
  // Warpgroup 0 produces. Named barrier i is the turn of warpgroup i; the next ones are for a consumer's own threads.
  const auto await_turn = [&] {
    if constexpr (Shape::kTurns) {
      sync_threads(fresh_thread() / kWarpgroup, 2 * kWarpgroup);
    }
  };
  const auto pass_turn = [&] {
    if constexpr (Shape::kTurns) {
      arrive_threads(fresh_thread() / kWarpgroup % Shape::kConsumers + 1, 2 * kWarpgroup);
    }
  };
  if (consumer == Shape::kConsumers - 1) {
    pass_turn();
  }

  const float scale_log2 = range.scale * kLog2E;
  const uint64_t q_at = tile_descriptor(shared_address(shared.q), 0);
  const uint64_t grad_out_at = tile_descriptor(shared_address(shared.grad_out), 0);
  const uint64_t k_at = tile_descriptor(shared_address(shared.k), kPanelBytes);
  const uint64_t v_at = tile_descriptor(shared_address(shared.v), 0);
  Place<Shape::kKStages> k_place;  // of the sums' K: the scores' is one further, but in a tile's first step
  Place<Shape::kVStages> v_place;
  Place<Shape::kRowSlots> slot;
  for (int i = 0; i < consumer; ++i) {
    slot.advance();
  }

  for_each_row_tile(params, Shape::kConsumers * params.consumer_rows, [&](const RowTile& tile) {
    const int32_t first_row = tile.first_row + row;
    const auto place_of_row = [&](int half) {
      return row_at(s, tile.head_kv, min(first_row + 8 * half, tile.last_row));
    };
    const int32_t batch = static_cast<int32_t>(tile.place.batch);
    const int32_t q_begin = static_cast<int32_t>(tile.place.q_begin);
    const auto number_of_row = [&](const RowView& numbers, int half) {
      const Row at = place_of_row(half);
      return numbers.at(batch, at.head, int64_t{q_begin} + at.query);
    };

    const auto row_of_gradient = [&](int half) -> Element* {
      if (own_row + 8 * half >= params.consumer_rows || first_row + 8 * half > tile.last_row) {
        return nullptr;
      }
      const Row at = place_of_row(half);
      return range.grad_q.row<Element>(batch, int64_t{q_begin} + at.query, at.head);
    };
    if (tile.begin >= tile.end) {
      if (!range.add_to_grad_q) {
        for (int half = 0; half < 2; ++half) {
          Element* const to = row_of_gradient(half);
          for (int column = column_of_chunk(0, lane); to != nullptr && column < range.grad_q.width; column += 32) {
            *reinterpret_cast<uint4*>(to + column) = uint4{};
          }
        }
      }
      return;
    }

    float lse[2];
    float delta[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      lse[half] = number_of_row(range.lse, half) * kLog2E;
      delta[half] = number_of_row(range.delta, half);
    }
    const int32_t offset = tile.place.offset;
    // Keys in [all_begin, all_end) are seen by every row.
    const int32_t all_begin = range.visibility.begin(offset + row_at(s, 0, tile.last_row).query);
    const int32_t all_end = min(range.visibility.end(offset + row_at(s, 0, tile.first_row).query), tile.keys.length);
    // Stands for a probability of 1, whose score has no gradient but that of lse.
    constexpr float kWhole = -1.f;
    const float whole = range.grad_lse.data == nullptr ? 0.f : kWhole;
    float grad_q[Shape::kDimK / 8][4];
    clear(grad_q);
    float scores[kKeys / 8][4];
    float grads[kKeys / 8][4];
    uint32_t weights[kKeys / 16][4];

    const auto start_scores = [&](const Place<Shape::kKStages>& place) {
      start_product<QTile, KTile>(scores, advance(q_at, slot.stage * QTile::kSize * kBytes),
                                  advance(k_at, place.stage * KTile::kSize * kBytes));
    };
    const auto start_grads = [&] {
      start_product<GradOutTile, VTile>(grads, advance(grad_out_at, slot.stage * GradOutTile::kSize * kBytes),
                                        advance(v_at, v_place.stage * VTile::kSize * kBytes));
    };
    const auto start_sums = [&] {
      const uint64_t k = advance(k_at, k_place.stage * KTile::kSize * kBytes);
      hold(grad_q);
      fence_products();
#pragma unroll
      for (int i = 0; i < kKeys / 16; ++i) {
        multiply_columns<Element, kPanelBytes>(grad_q, weights[i], advance(k, 2 * 64 * 16 * i));
      }
      commit_products();
    };
    const auto take_probabilities = [&] {
#pragma unroll
      for (int i = 0; i < kKeys / 8; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float probability = exp2_approx(fmaf(scores[i][j], scale_log2, -lse[j / 2]));
          scores[i][j] = probability > kWholeProbability<Element> ? whole : probability;
        }
      }
    };
    const auto take_weights = [&](int32_t key) {
#pragma unroll
      for (int i = 0; i < kKeys / 8; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          grads[i][j] = scores[i][j] * (grads[i][j] - delta[j / 2]);
        }
      }
      if (range.grad_lse.data != nullptr) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float grad_lse = number_of_row(range.grad_lse, half);
#pragma unroll
          for (int i = 0; i < kKeys / 8; ++i) {
#pragma unroll
            for (int j = 2 * half; j < 2 * half + 2; ++j) {
              grads[i][j] = scores[i][j] == kWhole ? grad_lse : grads[i][j];
            }
          }
        }
      }
      if (key < all_begin || key + kKeys > all_end) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int32_t position = offset + row_at(s, 0, first_row + 8 * half).query;
          const int32_t low = range.visibility.begin(position) - key;
          const int32_t high = min(range.visibility.end(position), tile.keys.length) - key;
          clear_outside(grads, half, low, high, lane);
        }
      }
#pragma unroll
      for (int i = 0; i < kKeys / 16; ++i) {
        as_left<Element>(weights[i], grads, i);
      }
    };
    const auto release_k = [&] {
      release(&shared.k_empty[k_place.stage]);
      k_place.advance();
    };
    const auto release_v = [&](bool last) {
      release(&shared.v_empty[v_place.stage]);
      v_place.advance();
      if (last) {
        release(&shared.rows_empty[slot.stage]);
      }
    };
    const auto await_k = [&](const Place<Shape::kKStages>& place) { wait(&shared.k_full[place.stage], place.parity); };
    const auto await_v = [&] { wait(&shared.v_full[v_place.stage], v_place.parity); };

    wait(&shared.rows_full[slot.stage], slot.parity);
    await_k(k_place);
    start_scores(k_place);
    await_v();
    start_grads();
    wait_products<1>();
    hold(scores);
    take_probabilities();
    wait_products<0>();
    hold(grads);
    release_v(tile.begin + kKeys >= tile.end);
    take_weights(tile.begin);

#pragma unroll 1
    for (int32_t key = tile.begin + kKeys; key < tile.end; key += kKeys) {
      Place<Shape::kKStages> next = k_place;
      next.advance();
      await_k(next);
      await_turn();
      start_sums();
      start_scores(next);
      wait_products<1>();
      hold(grad_q);
      release_k();
      await_v();
      start_grads();
      pass_turn();
      wait_products<1>();
      hold(scores);
      take_probabilities();
      wait_products<0>();
      hold(grads);
      release_v(key + kKeys >= tile.end);
      take_weights(key);
    }

    // Nobody's weight of a row past the end is other than 0, but 0 times what lies there may be NaN.
    const int32_t beyond = (tile.end - tile.begin - 1) % kKeys + 1;
    if (beyond < kKeys) {
#pragma unroll 1
      for (int i = 8 * beyond + thread; i < 8 * kKeys; i += kWarpgroup) {
#pragma unroll
        for (int panel = 0; panel < KTile::kPanels; ++panel) {
          Element* chunk = shared.k[k_place.stage] + panel * KTile::kPanelSize + 8 * i;
          *reinterpret_cast<uint4*>(chunk) = uint4{};
        }
      }
      fence_shared_writes();
      sync_threads(Shape::kConsumers + 1 + consumer, kWarpgroup);
    }
    start_sums();

    // Under the last product.
    constexpr int kChunks = Shape::kDimK / 32;
    Element* to[2];
    float factors[2];
    uint4 before[2][kChunks];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      to[half] = row_of_gradient(half);
      factors[half] = range.scale * (range.gate.data == nullptr ? 1.f : number_of_row(range.gate, half));
      read_row(before[half], to[half], range.add_to_grad_q && to[half] != nullptr ? range.grad_q.width : 0, lane);
    }
    wait_products<0>();
    hold(grad_q);
    release_k();
#pragma unroll
    for (int i = 0; i < Shape::kConsumers; ++i) {
      slot.advance();
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      write_row_sum(to[half], range.grad_q.width, grad_q, half, factors[half], range.add_to_grad_q, before[half], lane);
    }
  });
}

}  // namespace grad_q

// Empty unless it is compiled for sm_90a: see runs_on_this_device.
template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    range_backward_query_sm90(const __grid_constant__ RangeBackwardQuerySm90Params params) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<typename Shape::Shared*>(shared_bytes);
  if (threadIdx.x == 0) {
    for (int i = 0; i < Shape::kRowSlots; ++i) {
      init_barrier(&shared.rows_full[i], 1);
      init_barrier(&shared.rows_empty[i], kWarpgroup / 32);
    }
    for (int i = 0; i < Shape::kKStages; ++i) {
      init_barrier(&shared.k_full[i], 1);
      init_barrier(&shared.k_empty[i], Shape::kConsumers * kWarpgroup / 32);
    }
    for (int i = 0; i < Shape::kVStages; ++i) {
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
      grad_q::produce_keys<Shape>(params, shared);
    } else if (threadIdx.x / 32 == 1) {
      grad_q::produce_rows<Shape>(params, shared);
    }
  } else {
    grow_registers<Shape::kConsumerRegisters>();
    grad_q::consume<Shape>(params, shared, warpgroup - 1);
  }
#endif
}

}  // namespace nsa
