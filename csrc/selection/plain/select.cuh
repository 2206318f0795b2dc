// select_blocks in float32 without tensor cores: exact products, and the lists of selection/ranking.cuh.
//   p[m] = sum over the group's heads of exp(scale <q, k_m> - lse), for the compressed blocks m that the query sees
//
// Grid: (slots of kPlainWarps queries, KV heads), the heads fastest; a warp for each query, which has two keys of a
// tile in each lane. Shared memory: a tile of keys, padded to an odd number of floats a row, and a record for each
// query.
#pragma once

#include "selection/ranking.cuh"

namespace nsa {

constexpr int kPlainWarps = select_plain::kWarps;
constexpr int kPlainHeads = 4;  // whose scores are computed together
constexpr int kKeysPerLane = kKeysPerTile / 32;

// Adds the probabilities of a few heads, for the keys whose rows are k[0], k[1].
__device__ inline void add_probabilities(float (&sums)[kKeysPerLane], const SelectBlocksParams& params,
                                         const SequencePlace& place, int64_t token, int32_t first_head, int32_t heads,
                                         const float* const (&k)[kKeysPerLane]) {
  const float* q[kPlainHeads];
#pragma unroll
  for (int i = 0; i < kPlainHeads; ++i) {
    q[i] = params.q.row<const float>(place.batch, token, first_head + min(i, heads - 1));
  }
  float scores[kPlainHeads][kKeysPerLane] = {};
#pragma unroll 4
  for (int32_t c = 0; c < params.q.width; ++c) {
#pragma unroll
    for (int i = 0; i < kPlainHeads; ++i) {
      const float x = __ldg(q[i] + c);
#pragma unroll
      for (int j = 0; j < kKeysPerLane; ++j) {
        scores[i][j] = fmaf(x, k[j][c], scores[i][j]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kPlainHeads; ++i) {
    if (i < heads) {
      const float lse = params.lse.at(place.batch, first_head + i, token);
#pragma unroll
      for (int j = 0; j < kKeysPerLane; ++j) {
        sums[j] += expf(scores[i][j] * params.scale - lse);
      }
    }
  }
}

__global__ void __launch_bounds__(32 * kPlainWarps)
    select_blocks_plain(const __grid_constant__ SelectBlocksParams params) {
  extern __shared__ __align__(1024) unsigned char shared[];
  QueryRecord* const records = reinterpret_cast<QueryRecord*>(shared);
  float* const k_tile = reinterpret_cast<float*>(records + kPlainWarps);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;

  const SelectTile tile = find_select_tile(params, kPlainWarps);
  const SequencePlace place = place_of(params.sequences, tile.sequence);
  const int32_t end_query = min(tile.first_query + kPlainWarps, place.q_length);
  if (tile.first_query >= end_query) {
    return;
  }
  const int32_t query = tile.first_query + warp;
  const bool exists = query < end_query;
  const int32_t position = exists ? place.offset + query : -1;
  const int32_t visible = visible_keys(params, position);
  QueryRecord& record = records[warp];
  start_record(record, params, position, lane);
  __syncwarp();

  const TileSteps steps(params);
  const int32_t last_position = place.offset + end_query - 1;
  const int32_t end_key = visible_keys(params, last_position);
  const int32_t tiles =
      static_cast<int32_t>(ceil_div(own_block_of(last_position, params.select_size) + 1, steps.blocks));
  const int32_t width = params.k.width;
  const int32_t pitch = width | 1;
  const int32_t group = params.sequences.group;
  for (int32_t number = 0; number < tiles; ++number) {
    const int32_t first_key = number * steps.keys;
    __syncthreads();
    for (int row = warp; row < kKeysPerTile; row += kPlainWarps) {
      const int32_t key = first_key + row;
      const float* const from = params.k.row<const float>(place.batch, place.cmp_begin + key, tile.head_kv);
      for (int column = lane; column < width; column += 32) {
        k_tile[row * pitch + column] = key < end_key ? from[column] : 0.f;
      }
    }
    __syncthreads();
    if (exists) {
      float sums[kKeysPerLane] = {};
      const float* const k[kKeysPerLane] = {k_tile + lane * pitch, k_tile + (lane + 32) * pitch};
      for (int32_t head = 0; head < group; head += kPlainHeads) {
        add_probabilities(sums, params, place, place.q_begin + query, tile.head_kv * group + head, group - head, k);
      }
#pragma unroll
      for (int j = 0; j < kKeysPerLane; ++j) {
        const int32_t key = first_key + lane + 32 * j;
        record.strip[key & (kRing - 1)] = key < visible ? sums[j] : 0.f;
      }
      __syncwarp();
      rank_tile<1>(&record, 1, params, steps, number, lane);
    }
  }
  if (exists) {
    write_list(record, params, list_of(params, place, query, tile.head_kv), lane);
  }
}

}  // namespace nsa
