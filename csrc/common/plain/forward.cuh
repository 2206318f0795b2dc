// Attention in float32 without tensor cores, for whatever keys a row sees: what the forward and the backward
// (common/plain/backward.cuh) share, and the forward:
//   s_j = scale <q, k_j>,   lse = ln sum_j exp(s_j),   out = sum_j exp(s_j - lse) v_j
// Exact and slow: what other kernels are checked against.
//
// Grid: a warp for each row (query and head). Its keys come in chunks of 32, one per lane. Sums are of two levels, a
// chunk's and that of all chunks, which keeps rounding errors small. Shared memory, for each warp: 32 x 32 floats of
// the keys' columns, padded, and the query.
//
// Who sees whom is told by a Branch:
//   Forward, Backward                      the params
//   keys_of(params, place) -> KeysPlace    the keys of a sequence
//   key_starts(params)                     the first key of each packed sequence, (B + 1,), or null
//   keys_seen(params, place, keys, token, head_kv, position)  -> {count, at(i): key within the sequence, or -1}
//   queries_seeing(params, place, sequence, key, head_kv)     -> {count, at(i): query within the sequence, or -1}
#pragma once

#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#include "common/keys.cuh"
#include "common/launch.cuh"
#include "common/rows.cuh"
#include "common/threads.cuh"
#include "common/tiles.h"

namespace nsa::plain {

constexpr int kThreads = 32 * kWarps;
constexpr int kBlocksPerSM = 4;  // at least: up to 128 registers, and no spills
constexpr unsigned kAllLanes = 0xffffffffu;

using Staging = float[32 * kPitch];

__device__ inline const float* row_of_lane(const float* row, int lane) {
  const auto address = reinterpret_cast<unsigned long long>(row);
  return reinterpret_cast<const float*>(__shfl_sync(kAllLanes, address, lane));
}

// The product of the warp's vector, in shared memory and filled up with zeros to a multiple of 32, with the lane's own
// row; zero for null.
__device__ inline float dot_with_row(const float* vector, const float* row, int width, float* staging, int lane) {
  float sum = 0.f;
  for (int first = 0; first < width; first += 32) {
    __syncwarp();
#pragma unroll 16
    for (int i = 0; i < 32; ++i) {
      const float* from = row_of_lane(row, i);
      staging[i * kPitch + lane] = from != nullptr && first + lane < width ? __ldg(from + first + lane) : 0.f;
    }
    __syncwarp();
    float part[4] = {};
#pragma unroll
    for (int i = 0; i < 32; i += 4) {
      const float4 four = *reinterpret_cast<const float4*>(vector + first + i);
      const float* own = staging + lane * kPitch + i;
      part[0] = fmaf(four.x, own[0], part[0]);
      part[1] = fmaf(four.y, own[1], part[1]);
      part[2] = fmaf(four.z, own[2], part[2]);
      part[3] = fmaf(four.w, own[3], part[3]);
    }
    sum += (part[0] + part[1]) + (part[2] + part[3]);
  }
  return sum;
}

// sums = factor sums + the lanes' rows times their weights. This lane holds columns lane, lane + 32, ... of the sums. A
// null row counts as zeros.
template <int kSteps>
__device__ inline void add_rows(float (&sums)[kSteps], float factor, float weight, const float* row, int width,
                                int lane) {
  float part[kSteps] = {};
#pragma unroll 4
  for (int i = 0; i < 32; ++i) {
    const float weight_i = __shfl_sync(kAllLanes, weight, i);
    const float* from = row_of_lane(row, i);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int column = 32 * step + lane;
      const float x = from != nullptr && column < width ? __ldg(from + column) : 0.f;
      part[step] = fmaf(weight_i, x, part[step]);
    }
  }
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    sums[step] = fmaf(sums[step], factor, part[step]);
  }
}

// kColumns of a vector, zeros beyond its width.
template <int kColumns>
__device__ inline void load_vector(float* to, const float* from, int width, int thread, int threads) {
  for (int column = thread; column < kColumns; column += threads) {
    to[column] = column < width ? from[column] : 0.f;
  }
}

__device__ inline float warp_max(float x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, offset));
  }
  return x;
}
__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    x += __shfl_xor_sync(kAllLanes, x, offset);
  }
  return x;
}

NSA_HOST_DEVICE inline int64_t count_rows(const SequenceLayout& s) { return count_tokens(s) * s.heads_kv * s.group; }

// Row number `index`: heads of a group lie together, then the tokens of a KV head.
struct RowPlace {
  SequencePlace place;
  int64_t number;  // of the token, counted through the whole batch
  int64_t token;   // within its batch entry
  int32_t head;    // among all query heads
  int32_t head_kv;
  int32_t position;  // negative for a row that sees nothing

  __device__ RowPlace(const SequenceLayout& s, int64_t index) {
    const int64_t tokens = count_tokens(s);
    const int64_t pair = index / s.group;
    head_kv = static_cast<int32_t>(pair / tokens);
    head = static_cast<int32_t>(head_kv * s.group + index % s.group);
    number = pair % tokens;
    const Tile at = find_query(s, number);
    place = place_of(s, at.sequence);
    token = place.q_begin + at.index;
    position = at.index < place.q_length ? place.offset + at.index : -1;
  }
};

// A warp's row, and the keys that it sees.
template <typename Branch, typename Params>
struct SeeingRow {
  using Seen = decltype(Branch::keys_seen(std::declval<const Params&>(), std::declval<const SequencePlace&>(),
                                          std::declval<const KeysPlace&>(), int64_t{}, int32_t{}, int32_t{}));
  const Params& params;
  RowPlace row;
  KeysPlace keys;
  Seen seen;

  __device__ SeeingRow(const Params& params_, int64_t index)
      : params(params_),
        row(params.sequences, index),
        keys(Branch::keys_of(params, row.place)),
        seen(Branch::keys_seen(params, row.place, keys, row.number, row.head_kv, row.position)) {}

  template <typename Element>
  __device__ Element* of(const TensorView& tensor) const {
    return tensor.row<Element>(row.place.batch, row.token, row.head);
  }
  // kColumns of the row of a tensor, to shared memory.
  template <int kColumns>
  __device__ void load(float (&to)[kColumns], const TensorView& from) const {
    load_vector<kColumns>(to, of<const float>(from), from.width, this_lane(), 32);
  }

  // Calls visit(k, v) for the first `count` of the keys, 32 at a time: the rows of this lane's key, null where it has
  // none.
  template <typename Visit>
  __device__ void for_each_key(int64_t count, const Visit& visit) const {
    const int lane = this_lane();
    for (int64_t first = 0; first < count; first += 32) {
      const int32_t key = first + lane < count ? seen.at(static_cast<int32_t>(first + lane)) : -1;
      if (__ballot_sync(kAllLanes, key >= 0) == 0) {
        continue;
      }
      const float* k = nullptr;
      const float* v = nullptr;
      if (key >= 0) {
        k = params.k.template row<const float>(row.place.batch, keys.begin + key, row.head_kv);
        v = params.v.template row<const float>(row.place.batch, keys.begin + key, row.head_kv);
      }
      visit(k, v);
    }
  }
};

// The index of a warp's row.
__device__ inline int64_t row_of_warp() { return int64_t{blockIdx.x} * kWarps + this_warp(); }

template <typename Branch, int kColumns>
__global__ void __launch_bounds__(kThreads, kBlocksPerSM)
    forward_plain(const __grid_constant__ typename Branch::Forward params) {
  __shared__ Staging stagings[kWarps];
  __shared__ __align__(16) float q_rows[kWarps][kColumns];
  const int warp = this_warp();
  const int lane = this_lane();
  if (row_of_warp() >= count_rows(params.sequences)) {
    return;
  }
  const SeeingRow<Branch, typename Branch::Forward> at(params, row_of_warp());
  at.load(q_rows[warp], params.q);

  float out[kColumns / 32] = {};
  float maximum = kMinusInfinity;
  float sum = 0.f;
  at.for_each_key(at.seen.count, [&](const float* k, const float* v) {
    float score = dot_with_row(q_rows[warp], k, params.k.width, stagings[warp], lane) * params.scale;
    score = k != nullptr ? score : kMinusInfinity;
    const float highest = fmaxf(maximum, warp_max(score));
    const float offset = highest == kMinusInfinity ? 0.f : highest;
    const float factor = expf(maximum - offset);
    const float p = expf(score - offset);
    maximum = highest;
    sum = fmaf(sum, factor, warp_sum(p));
    add_rows(out, factor, p, v, params.v.width, lane);
  });

  const bool empty = sum == 0.f;
  float* to = at.template of<float>(params.out);
#pragma unroll
  for (int step = 0; step < kColumns / 32; ++step) {
    if (32 * step + lane < params.out.width) {
      to[32 * step + lane] = empty ? 0.f : out[step] / sum;
    }
  }
  if (lane == 0) {
    params.lse.at(at.row.place.batch, at.row.head, at.row.token) = empty ? kMinusInfinity : maximum + logf(sum);
  }
}

// Calls launch(integral constant) with the columns that hold both widths.
template <typename Launch>
void with_columns(const char* name, int32_t width_k, int32_t width_v, const Launch& launch_with) {
  if (width_k > kLargestHeadDim || width_v > kLargestHeadDim) {
    throw std::runtime_error(std::string("nsa_torch: ") + name + ": head dimensions above 256 have no kernel");
  }
  switch (columns(width_k, width_v)) {
    case kColumns[0]:
      return launch_with(std::integral_constant<int, kColumns[0]>());
    case kColumns[1]:
      return launch_with(std::integral_constant<int, kColumns[1]>());
    default:
      return launch_with(std::integral_constant<int, kColumns[2]>());
  }
}

template <typename Branch>
void launch_forward(const typename Branch::Forward& params, cudaStream_t stream, const char* name) {
  if (params.sequences.batch == 0) {
    return;
  }
  with_columns(name, params.q.width, params.v.width, [&](auto of_tile) {
    launch(forward_plain<Branch, of_tile()>, ceil_div(count_rows(params.sequences), kWarps), kThreads, 0, stream, name,
           params);
  });
}

}  // namespace nsa::plain
