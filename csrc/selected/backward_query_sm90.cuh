// Attention over listed blocks, backward, for Hopper: the gradient of q.
//   P = exp(scale q K^T - lse), dS = P (dO V^T - delta), dq = scale gate dS K
//
// The forward's tiles and walk: see union_walk_sm90.cuh. A warpgroup's 64 rows of dq stay in registers. For each block
// that several of its tokens chose it starts Q K^T and dO V^T together, turns them into dS, which stays in registers,
// and adds dS K; rows of tokens that did not choose the block have dS = 0. A block that one token chose is left to that
// token's warp, which holds the same rows and columns by mma.sync.
#pragma once

#include "common/scores.cuh"
#include "selected/row_products_sm90.cuh"
#include "selected/union_walk_sm90.cuh"

namespace nsa {

struct SelectedBackwardQuerySm90Params {
  SelectedBackwardParams selected;
  UnionParams walk;
};

// The panels of a gradient of q that one product adds to: 64 or 128 columns.
template <int kDimK>
struct GradientParts {
  static constexpr int kColumns = kDimK == 128 ? 128 : 64;
  static constexpr int kCount = kDimK / kColumns;
};

template <typename Shape>
__device__ inline void consume_backward_query(const SelectedBackwardQuerySm90Params& params,
                                              const UnionShared<Shape>& shared,
                                       int group, int warp) {
  using Element = typename Shape::Element;
  using KTile = typename Shape::KTile;
  using VTile = typename Shape::VTile;
  using Parts = GradientParts<Shape::kDimK>;
  const SelectedBackwardParams& p = params.selected;
  const UnionParams& u = params.walk;
  const float scale_log2 = p.scale * kLog2E;
  UnionRing<Shape> ring{shared, threadIdx.x % 32 == 0, 0};

  // Of the lane's rows.
  float lse[2];
  float delta[2];
  float grad[Parts::kCount][Parts::kColumns / 8][4];

  const auto row_grad_lse = [&](int half, int lane) -> float& {
    return shared.barriers->grad_lse[fresh_thread() / 32 * 16 + 8 * half + lane / 4];
  };

  const auto begin = [&](const UnionTile& tile) {
    const int lane = fresh_lane();
    const int32_t first_token = group * group_tokens_of<Shape>(u);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const UnionRow row = union_row<Shape>(u, warp, half, lane);
      const int32_t query = tile.first_query + first_token + row.token;
      const bool exists = query < tile.place.q_length && row.head < tile.heads;
      const int32_t head = tile.first_head + row.head;
      const int64_t token = tile.place.q_begin + query;
      lse[half] = exists ? p.lse.at(tile.place.batch, head, token) * kLog2E : 0.f;
      delta[half] = exists ? p.delta.at(tile.place.batch, head, token) : 0.f;
      if (lane % 4 == 0) {
        const float gate = exists && p.gate.data != nullptr ? p.gate.at(tile.place.batch, head, token) : 1.f;
        const float grad_lse =
            exists && p.grad_lse.data != nullptr ? p.grad_lse.at(tile.place.batch, head, token) : 0.f;
        row_grad_lse(half, lane) = grad_lse == 0.f ? 0.f : grad_lse / gate;
      }
    }
#pragma unroll
    for (int i = 0; i < Parts::kCount; ++i) {
      clear(grad[i]);
    }
    __syncwarp();
  };

  // All bits, if the token of one of the lane's rows is among those.
  const auto chosen = [&](uint32_t tokens, int half) {
    const int token = head_slots_of<Shape>(u) == 16 ? warp : 2 * warp + half;
    return 0u - (tokens >> token & 1);
  };
  // Scores become probabilities. Returns whether a row that chose the block may have one key with all of it.
  const auto weigh = [&]<int kTiles>(float(&scores)[kTiles][4], uint32_t tokens) {
    float highest[2] = {};
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        scores[i][j] = exp2_approx(fmaf(scores[i][j], scale_log2, -lse[j / 2]));
        highest[j / 2] = fmaxf(highest[j / 2], scores[i][j]);
      }
    }
    const uint32_t rows[2] = {chosen(tokens, 0), chosen(tokens, 1)};
    return __any_sync(0xffffffffu, (rows[0] != 0 && highest[0] > kWholeProbability<Element>) ||
                                       (rows[1] != 0 && highest[1] > kWholeProbability<Element>)) != 0;
  };
  // Probabilities become the gradients of scores.
  const auto differentiate = [&]<int kTiles>(float(&scores)[kTiles][4], const float(*grads)[4], bool whole) {
    if (whole) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float grad_lse = row_grad_lse(half, fresh_lane());
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
#pragma unroll
          for (int j = 2 * half; j < 2 * half + 2; ++j) {
            scores[i][j] = scores[i][j] > kWholeProbability<Element> ? grad_lse
                                                                     : scores[i][j] * (grads[i][j] - delta[half]);
          }
        }
      }
    } else {
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          scores[i][j] *= grads[i][j] - delta[j / 2];
        }
      }
    }
  };
  // None where a row sees no key, whatever lies there.
  const auto mask = [&](float(&scores)[8][4], int32_t key, const UnionSeen& seen) {
    const int lane = fresh_lane();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int32_t keys = seen.limit(union_row<Shape>(u, warp, half, lane).token) - key;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float& score = scores[i][2 * half + j];
          score = 8 * i + 2 * (lane % 4) + j < keys ? score : 0.f;
        }
      }
    }
  };

  // Rows stay in registers, but for Q of more than 128 columns, which stays in shared memory.
  constexpr bool kQInRegisters = Shape::kDimK <= 128;
  uint32_t q[kQInRegisters ? Shape::kDimK / 16 : 1][4];
  uint32_t grad_out[Shape::kDimV / 16][4];
  const KTile own_q{shared_address(shared.rows) + group * Shape::kGroupBytes};
  const auto take_rows = [&](uint32_t step) {
    const int lane = fresh_lane();
    const VTile grad_out_tile = ring.wait_v(step);
#pragma unroll
    for (int i = 0; i < Shape::kDimV / 16; ++i) {
      grad_out_tile.load_left(grad_out[i], 16 * warp, 16 * i, lane);
    }
    ring.release_v(step);
    const KTile q_tile = ring.wait_k(step);
    if constexpr (kQInRegisters) {
#pragma unroll
      for (int i = 0; i < Shape::kDimK / 16; ++i) {
        q_tile.load_left(q[i], 16 * warp, 16 * i, lane);
      }
    } else {
      const uint32_t first = 16 * warp * 128 + 16 * lane;
#pragma unroll
      for (int panel = 0; panel < KTile::kPanels; ++panel) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const uint32_t at = panel * KTile::kPanelSize * 2 + first + 512 * i;
          store_shared(own_q.begin + at, load_shared(q_tile.begin + at));
        }
      }
      fence_shared_writes();
      sync_threads(1 + group, kWarpgroup);
    }
    ring.release_k(step);
  };

  const auto take = [&](const UnionStep& step, const UnionSeen& seen) {
    float scores[8][4];
    float grads[8][4];
    if (Shape::kMostAlone > 0 && step.alone) {
      const int lane = fresh_lane();
      const auto multiply_columns = [&]<int kTiles>(float(&to)[kTiles][4], const uint32_t(&left)[4], const auto& right,
                                                    int first, int column) {
#pragma unroll
        for (int i = 0; i < kTiles / 2; ++i) {
          uint32_t b[4];
          right.load_right_transposed(b, first + 16 * i, column, lane);
          multiply_add<Element>(to[2 * i], left, b[0], b[1]);
          multiply_add<Element>(to[2 * i + 1], left, b[2], b[3]);
        }
      };
      const auto multiply = [&](auto& to, const auto& left, const auto& right, int first) {
        clear(to);
#pragma unroll
        for (int column = 0; column < right.kColumns; column += 16) {
          multiply_columns(to, left[column / 16], right, first, column);
        }
      };
      multiply(grads, grad_out, ring.wait_v(step.number), 0);
      ring.release_v(step.number);
      const KTile k_tile = ring.wait_k(step.number);
#pragma unroll
      for (int part = 0; part < 2; ++part) {  // of 32 keys: registers are few
        float part_scores[4][4];
        if constexpr (kQInRegisters) {
          multiply(part_scores, q, k_tile, 32 * part);
        } else {
          clear(part_scores);
#pragma unroll
          for (int column = 0; column < Shape::kDimK; column += 16) {
            uint32_t a[4];
            own_q.load_left(a, 16 * warp, column, lane);
            multiply_columns(part_scores, a, k_tile, 32 * part, column);
          }
        }
        const bool whole = weigh(part_scores, step.tokens);
        differentiate(part_scores, grads + 4 * part, whole);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          uint32_t a[4];
          as_left<Element>(a, part_scores, i);
          if constexpr (Shape::kWide) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              a[j] &= chosen(step.tokens, j % 2);
            }
          }
#pragma unroll
          for (int column = 0; column < Shape::kDimK; column += 16) {
            uint32_t b[4];
            k_tile.load_right(b, 32 * part + 16 * i, column, lane);
            auto& sums = grad[column / Parts::kColumns];
            multiply_add<Element>(sums[column % Parts::kColumns / 8], a, b[0], b[1]);
            multiply_add<Element>(sums[column % Parts::kColumns / 8 + 1], a, b[2], b[3]);
          }
        }
      }
      ring.release_k(step.number);
      return;
    }
    const VTile v_tile = ring.wait_v(step.number);
    const KTile k_tile = ring.wait_k(step.number);
    if (step.key + Shape::kKeys > seen.k_length) {
      clear_rows(k_tile, max(seen.k_length - step.key, 0), 1 + group);
    }
    const uint64_t k = tile_descriptor(k_tile.begin, KTile::kPanelSize * 2);
    const uint64_t v = tile_descriptor(v_tile.begin, 0);
    const auto start = [&](float(&to)[8][4], const auto& rows, uint64_t columns, int panel_size) {
      fence_products();
      multiply_rows_first<Element>(to, rows[0], columns);
#pragma unroll
      for (int i = 1; i < static_cast<int>(sizeof(rows) / sizeof(rows[0])); ++i) {
        multiply_rows<Element>(to, rows[i], advance(columns, 2 * (i / 4 * panel_size + i % 4 * 16)));
      }
      commit_products();
    };
    if constexpr (kQInRegisters) {
      start(scores, q, k, KTile::kPanelSize);
    } else {
      const uint64_t rows = tile_descriptor(own_q.begin, 0);
      fence_products();
#pragma unroll
      for (int column = 0; column < Shape::kDimK; column += 16) {
        const int bytes = 2 * (column / 64 * KTile::kPanelSize + column % 64);
        multiply_async<Element>(scores, advance(rows, bytes), advance(k, bytes), column != 0);
      }
      commit_products();
    }
    start(grads, grad_out, v, VTile::kPanelSize);
    wait_products<1>();
    hold(scores);
    const bool whole = weigh(scores, step.tokens);
    wait_products<0>();
    hold(grads);
    ring.release_v(step.number);
    differentiate(scores, grads, whole);
    if (step.key + Shape::kKeys > seen.limit(0)) {
      mask(scores, step.key, seen);
    }
    uint32_t weights[4][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      as_left<Element>(weights[i], scores, i);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        weights[i][j] &= chosen(step.tokens, j % 2);
      }
    }
#pragma unroll
    for (int part = 0; part < Parts::kCount; ++part) {
      hold(grad[part]);
    }
    fence_products();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int part = 0; part < Parts::kCount; ++part) {
        multiply_async<Element>(
            grad[part], weights[i],
            advance(k, 2 * (part * Parts::kColumns / 64 * KTile::kPanelSize + 64 * 16 * i)), true);
      }
    }
    commit_products();
    wait_products<0>();
#pragma unroll
    for (int part = 0; part < Parts::kCount; ++part) {
      hold(grad[part]);
    }
    ring.release_k(step.number);
  };

  const auto end = [&](const UnionTile& tile) {
    const int lane = fresh_lane();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const UnionRow row = union_row<Shape>(u, warp, half, lane);
      const int32_t query = tile.first_query + group * group_tokens_of<Shape>(u) + row.token;
      Element* to = nullptr;
      float factor = p.scale;
      if (query < tile.place.q_length && row.head < tile.heads) {
        to = p.grad_q.row<Element>(tile.place.batch, tile.place.q_begin + query, tile.first_head + row.head);
        if (p.gate.data != nullptr) {
          factor *= p.gate.at(tile.place.batch, tile.first_head + row.head, tile.place.q_begin + query);
        }
      }
#pragma unroll
      for (int part = 0; part < Parts::kCount; ++part) {
        const int first = part * Parts::kColumns;
        write_sums(to == nullptr ? nullptr : to + first, p.grad_q.width - first, grad[part], half, factor,
                   p.add_to_grad_q, lane);
      }
    }
  };
  consume_unions(u, shared, group, warp, begin, take_rows, take, end);
}

// Empty unless it is compiled for sm_90a: see runs_on_this_device.
template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    selected_backward_query_sm90(const __grid_constant__ SelectedBackwardQuerySm90Params params) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) unsigned char union_shared[];
  const UnionShared<Shape> shared(union_shared, params.walk);
  const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32, 0);
  start_union(shared);
  if (warp >= Shape::kWarps) {
    shrink_registers<Shape::kProducerRegisters>();
    if (threadIdx.x == 32 * Shape::kWarps) {
      produce_union(params.walk, shared);
    } else if (warp == Shape::kWarps + 1) {
      merge_unions(params.walk, shared);
    }
  } else {
    grow_registers<Shape::kConsumerRegisters>();
    consume_backward_query(params, shared, warp / 4, warp % 4);
  }
#endif
}

}  // namespace nsa
