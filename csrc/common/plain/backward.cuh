// Attention in float32 without tensor cores, backward (the forward: common/plain/forward.cuh):
//   p_j = exp(s_j - lse),   ds_j = p_j gate (<dO, v_j> - delta)
//   dq = scale sum_j ds_j k_j,   dk_j = scale sum ds_j q,   dv_j = sum p_j gate dO
// the last two sums over the rows that see key j.
//
// Grid: for dq, a warp for each row; for dk and dv, a block of threads for each key and KV head, each warp of it taking
// every fourth chunk of 32 rows. No atomics: the warps' sums are added in order. Shared memory as in the forward.
#pragma once

#include "common/plain/forward.cuh"
#include "common/plan.h"
#include "common/row_gradient.cuh"

namespace nsa::plain {

template <typename Branch, int kColumns>
__global__ void __launch_bounds__(kThreads, kBlocksPerSM)
    backward_query_plain(const __grid_constant__ typename Branch::Backward params) {
  __shared__ Staging stagings[kWarps];
  __shared__ __align__(16) float q_rows[kWarps][kColumns];
  __shared__ __align__(16) float grad_out_rows[kWarps][kColumns];
  const int warp = this_warp();
  const int lane = this_lane();
  if (row_of_warp() >= count_rows(params.sequences)) {
    return;
  }
  const SeeingRow<Branch, typename Branch::Backward> at(params, row_of_warp());
  at.load(q_rows[warp], params.q);
  at.load(grad_out_rows[warp], params.grad_out);
  const RowGradient gradient(params, at.row.place.batch, at.row.head, at.row.token);

  float grad_q[kColumns / 32] = {};
  at.for_each_key(gradient.lse == kMinusInfinity ? 0 : at.seen.count, [&](const float* k, const float* v) {
    const float score = dot_with_row(q_rows[warp], k, params.k.width, stagings[warp], lane) * params.scale;
    const float grad_p = dot_with_row(grad_out_rows[warp], v, params.v.width, stagings[warp], lane);
    const float grad_score = k != nullptr ? gradient.grad_score<float>(expf(score - gradient.lse), grad_p) : 0.f;
    add_rows(grad_q, 1.f, grad_score, k, params.k.width, lane);
  });

  float* to = at.template of<float>(params.grad_q);
#pragma unroll
  for (int step = 0; step < kColumns / 32; ++step) {
    const int column = 32 * step + lane;
    if (column < params.grad_q.width) {
      to[column] = fmaf(grad_q[step], params.scale, params.add_to_grad_q ? to[column] : 0.f);
    }
  }
}

// Which packed sequence key `number` of all lies in.
__device__ inline Tile find_key(const int32_t* starts, int32_t batch, int64_t keys_per_sequence, int64_t number) {
  if (starts == nullptr) {
    return {static_cast<int32_t>(number / keys_per_sequence), static_cast<int32_t>(number % keys_per_sequence)};
  }
  const int32_t sequence = last_sequence_before<int32_t>(batch, number, [&](int32_t i) { return starts[i]; });
  return {sequence, static_cast<int32_t>(number - starts[sequence])};
}

// A warp's sums for the block's key, of which kColumns / 32 columns are this lane's.
template <int kColumns>
struct KeySums {
  float grad_k[kColumns / 32] = {};
  float grad_v[kColumns / 32] = {};

  // Adds what row (query, head) brings; query -1 brings nothing. Of 32 lanes, a row each.
  template <typename Params>
  __device__ void add(const Params& params, const float* k_row, const float* v_row, const SequencePlace& place,
                      int32_t query, int32_t head, float* staging) {
    const int lane = this_lane();
    const int64_t token = place.q_begin + query;
    const bool sees = query >= 0 && params.lse.at(place.batch, head, token) != kMinusInfinity;
    if (__ballot_sync(kAllLanes, sees) == 0) {
      return;
    }
    const float* q = nullptr;
    const float* grad_out = nullptr;
    if (sees) {
      q = params.q.template row<const float>(place.batch, token, head);
      grad_out = params.grad_out.template row<const float>(place.batch, token, head);
    }
    const float score = dot_with_row(k_row, q, params.q.width, staging, lane) * params.scale;
    const float grad_p = dot_with_row(v_row, grad_out, params.grad_out.width, staging, lane);
    float p = 0.f;
    float grad_score = 0.f;
    if (sees) {
      const RowGradient gradient(params, place.batch, head, token);
      p = expf(score - gradient.lse);
      grad_score = gradient.grad_score<float>(p, grad_p);
      p *= gradient.gate;
    }
    add_rows(grad_k, 1.f, grad_score, q, params.q.width, lane);
    add_rows(grad_v, 1.f, p, grad_out, params.grad_out.width, lane);
  }

  // Stages the sums of all warps, and writes their total, in the warps' order, to the key's gradients.
  __device__ void store(Staging (&stagings)[kWarps], float* to_k, int width_k, float scale, float* to_v, int width_v) {
    static_assert(2 * kColumns <= 32 * kPitch, "the warps' sums are staged where the rows were");
    __syncwarp();
#pragma unroll
    for (int step = 0; step < kColumns / 32; ++step) {
      stagings[this_warp()][32 * step + this_lane()] = grad_k[step];
      stagings[this_warp()][kColumns + 32 * step + this_lane()] = grad_v[step];
    }
    __syncthreads();
    const auto total = [&](int i) {
      float sum = stagings[0][i];
#pragma unroll
      for (int other = 1; other < kWarps; ++other) {
        sum += stagings[other][i];
      }
      return sum;
    };
    for (int column = static_cast<int>(threadIdx.x); column < width_k; column += kThreads) {
      to_k[column] = total(column) * scale;
    }
    for (int column = static_cast<int>(threadIdx.x); column < width_v; column += kThreads) {
      to_v[column] = total(kColumns + column);
    }
  }
};

template <typename Branch, int kColumns>
__global__ void __launch_bounds__(kThreads, kBlocksPerSM)
    backward_keys_plain(const __grid_constant__ typename Branch::Backward params) {
  __shared__ Staging stagings[kWarps];
  __shared__ __align__(16) float k_row[kColumns];
  __shared__ __align__(16) float v_row[kColumns];
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = this_lane();
  const SequenceLayout& s = params.sequences;
  const int64_t all_keys = gridDim.x / static_cast<unsigned>(s.heads_kv);
  const int32_t head_kv = static_cast<int32_t>(blockIdx.x / all_keys);
  const int64_t number = blockIdx.x % all_keys;
  const Tile at = find_key(Branch::key_starts(params), s.batch, s.packed() ? 1 : all_keys / s.batch, number);
  const SequencePlace place = place_of(s, at.sequence);
  const KeysPlace keys = Branch::keys_of(params, place);
  const int64_t token = keys.begin + at.index;
  load_vector<kColumns>(k_row, params.k.template row<const float>(place.batch, token, head_kv), params.k.width, thread,
                        kThreads);
  load_vector<kColumns>(v_row, params.v.template row<const float>(place.batch, token, head_kv), params.v.width, thread,
                        kThreads);
  __syncthreads();

  KeySums<kColumns> sums;
  if (at.index < keys.length) {
    const auto seeing = Branch::queries_seeing(params, place, at.sequence, at.index, head_kv);
    const int64_t rows = int64_t{seeing.count} * s.group;
    for (int64_t first = 32 * this_warp(); first < rows; first += kThreads) {
      int32_t query = -1;
      int32_t head = 0;
      if (first + lane < rows) {
        const Row row = row_at(s, head_kv, static_cast<int32_t>(first + lane));
        query = seeing.at(row.query);
        head = row.head;
      }
      sums.add(params, k_row, v_row, place, query, head, stagings[this_warp()]);
    }
  }
  sums.store(stagings, params.grad_k.template row<float>(place.batch, token, head_kv), params.grad_k.width,
             params.scale, params.grad_v.template row<float>(place.batch, token, head_kv), params.grad_v.width);
}

// `num_keys`: dense, of every sequence; packed, of all.
template <typename Branch>
void launch_backward(const typename Branch::Backward& params, int64_t num_keys, NeededGradients needed,
                     cudaStream_t stream, const char* name) {
  const SequenceLayout& s = params.sequences;
  if (s.batch == 0) {
    return;
  }
  with_columns(name, params.q.width, params.v.width, [&](auto of_tile) {
    if (needed.query) {
      launch(backward_query_plain<Branch, of_tile()>, ceil_div(count_rows(s), kWarps), kThreads, 0, stream, name,
             params);
    }
    if (needed.keys) {
      launch(backward_keys_plain<Branch, of_tile()>, (s.packed() ? num_keys : s.batch * num_keys) * s.heads_kv,
             kThreads, 0, stream, name, params);
    }
  });
}

}  // namespace nsa::plain
