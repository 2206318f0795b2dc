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

#include "common/keys.cuh"
#include "common/launch.cuh"
#include "common/rows.cuh"

namespace nsa::plain {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kBlocksPerSM = 4;  // at least: up to 128 registers, and no spills
constexpr int kMaxWidth = 256;
constexpr int kPitch = 33;
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

NSA_HOST_DEVICE inline int64_t count_tokens(const SequenceLayout& s) {
  return s.packed() ? s.length_q : s.batch * s.length_q;
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

template <typename Branch, int kColumns>
__global__ void __launch_bounds__(kThreads, kBlocksPerSM)
    forward_plain(const __grid_constant__ typename Branch::Forward params) {
  __shared__ Staging stagings[kWarps];
  __shared__ __align__(16) float q_rows[kWarps][kColumns];
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t index = int64_t{blockIdx.x} * kWarps + warp;
  if (index >= count_rows(params.sequences)) {
    return;
  }
  const RowPlace row(params.sequences, index);
  const SequencePlace& place = row.place;
  const KeysPlace keys = Branch::keys_of(params, place);
  const auto seen = Branch::keys_seen(params, place, keys, row.number, row.head_kv, row.position);
  load_vector<kColumns>(q_rows[warp], params.q.template row<const float>(place.batch, row.token, row.head),
                        params.q.width, lane, 32);

  float out[kColumns / 32] = {};
  float maximum = kMinusInfinity;
  float sum = 0.f;
  for (int64_t first = 0; first < seen.count; first += 32) {
    const int32_t key = first + lane < seen.count ? seen.at(static_cast<int32_t>(first + lane)) : -1;
    if (__ballot_sync(kAllLanes, key >= 0) == 0) {
      continue;
    }
    const float* k = nullptr;
    const float* v = nullptr;
    if (key >= 0) {
      k = params.k.template row<const float>(place.batch, keys.begin + key, row.head_kv);
      v = params.v.template row<const float>(place.batch, keys.begin + key, row.head_kv);
    }
    float score = dot_with_row(q_rows[warp], k, params.k.width, stagings[warp], lane) * params.scale;
    score = key >= 0 ? score : kMinusInfinity;
    const float highest = fmaxf(maximum, warp_max(score));
    const float offset = highest == kMinusInfinity ? 0.f : highest;
    const float factor = expf(maximum - offset);
    const float p = expf(score - offset);
    maximum = highest;
    sum = fmaf(sum, factor, warp_sum(p));
    add_rows(out, factor, p, v, params.v.width, lane);
  }

  const bool empty = sum == 0.f;
  float* to = params.out.template row<float>(place.batch, row.token, row.head);
#pragma unroll
  for (int step = 0; step < kColumns / 32; ++step) {
    if (32 * step + lane < params.out.width) {
      to[32 * step + lane] = empty ? 0.f : out[step] / sum;
    }
  }
  if (lane == 0) {
    params.lse.at(place.batch, row.head, row.token) = empty ? kMinusInfinity : maximum + logf(sum);
  }
}

// Calls launch(integral constant) with the columns that hold both widths.
template <typename Launch>
void with_columns(const char* name, int32_t width_k, int32_t width_v, const Launch& launch_with) {
  const int32_t width = width_k > width_v ? width_k : width_v;
  if (width > kMaxWidth) {
    throw std::runtime_error(std::string("nsa_torch: ") + name + ": head dimensions above 256 have no kernel");
  }
  if (width <= 64) {
    launch_with(std::integral_constant<int, 64>());
  } else if (width <= 128) {
    launch_with(std::integral_constant<int, 128>());
  } else {
    launch_with(std::integral_constant<int, 256>());
  }
}

template <typename Branch>
void launch_forward(const typename Branch::Forward& params, cudaStream_t stream, const char* name) {
  if (params.sequences.batch == 0) {
    return;
  }
  with_columns(name, params.q.width, params.v.width, [&](auto columns) {
    launch(forward_plain<Branch, columns()>, ceil_div(count_rows(params.sequences), kWarps), kThreads, 0, stream, name,
           params);
  });
}

}  // namespace nsa::plain
