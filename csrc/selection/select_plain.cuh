// select_blocks without tensor cores: exact in float32, any width, any strides, any group. One warp per query and KV head.
#pragma once

#include "common/rows.cuh"
#include "common/sequences.cuh"
#include "common/matrix.cuh"
#include "selection/best_blocks.cuh"
#include "selection/params.h"

namespace nsa {

constexpr int kPlainSelectWarps = 4;
constexpr int kPlainSelectKeys = 64;
constexpr int kPlainMostOverlap = 64;

template <typename Element>
__global__ void __launch_bounds__(32 * kPlainSelectWarps)
    select_blocks_plain(const __grid_constant__ SelectBlocksParams params) {
  __shared__ float strips[kPlainSelectWarps][kPlainSelectKeys + kPlainMostOverlap];
  const int lane = static_cast<int>(threadIdx.x) % 32;
  float* const strip = strips[threadIdx.x / 32];
  const Sequences& s = params.sequences;
  const int64_t index = int64_t{blockIdx.x} * kPlainSelectWarps + threadIdx.x / 32;
  const int64_t token = index / s.heads_kv;
  const int32_t head_kv = static_cast<int32_t>(index % s.heads_kv);
  if (token >= (s.packed() ? s.length_q : s.batch * s.length_q)) {
    return;
  }
  const Tile at = find_query(s, token);
  const SequencePlace place = place_of(s, at.sequence);
  const int32_t position = place.offset + at.index;
  const int pieces_per_compressed = params.block_size / params.block_stride;
  const int pieces_per_selected = params.select_size / params.block_stride;
  const int carry = pieces_per_compressed - 1;
  const int blocks_per_tile = kPlainSelectKeys / pieces_per_selected;
  const int step = blocks_per_tile * pieces_per_selected;
  const int64_t seen = num_compressed_blocks(int64_t{position} + 1, params.block_size, params.block_stride);
  const Choice choice(params.forced, position, params.select_size, params.num_selected);
  BestBlocks best;
  for (int i = lane; i < carry; i += 32) {
    strip[i] = 0.f;
  }
  for (int32_t first_key = 0, first_block = 0; first_block <= choice.own && choice.free > 0;
       first_key += step, first_block += blocks_per_tile) {
    for (int i = lane; i < step; i += 32) {
      const int64_t key = first_key + i;
      float sum = 0.f;
      for (int32_t head = head_kv * s.group; key < seen && head < (head_kv + 1) * s.group; ++head) {
        const Element* const q = params.q.row<Element>(place.batch, place.q_begin + at.index, head);
        const Element* const k = params.k.row<Element>(place.batch, place.cmp_begin + key, head_kv);
        float score = 0.f;
        for (int32_t column = 0; column < params.q.width; ++column) {
          score = fmaf(to_float(q[column]), to_float(k[column]), score);
        }
        sum += expf(fmaf(score, params.scale, -params.lse.at(place.batch, head, place.q_begin + at.index)));
      }
      strip[carry + i] = sum;
    }
    __syncwarp();
    for (int i = lane; i - lane < blocks_per_tile; i += 32) {
      float importance = kNoBlock;
      if (i < blocks_per_tile && choice.candidate(first_block + i)) {
        importance = block_importance(strip + i * pieces_per_selected, pieces_per_compressed, pieces_per_selected);
      }
      best.take(importance, first_block + i, choice.free, lane);
    }
    __syncwarp();
    float carried[kPlainMostOverlap / 32];
#pragma unroll
    for (int i = 0; i < kPlainMostOverlap / 32; ++i) {
      carried[i] = lane + 32 * i < carry ? strip[step + lane + 32 * i] : 0.f;
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kPlainMostOverlap / 32; ++i) {
      if (lane + 32 * i < carry) {
        strip[lane + 32 * i] = carried[i];
      }
    }
    __syncwarp();
  }
  write_list(params.block_indices + (token * s.heads_kv + head_kv) * params.num_selected, params.num_selected, choice, best,
             reinterpret_cast<int32_t*>(strip), lane);
}

}  // namespace nsa
