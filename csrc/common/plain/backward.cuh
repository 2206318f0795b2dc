// Attention in float32 without tensor cores, backward (the forward: common/plain/forward.cuh):
//   p_j = exp(s_j - lse),   ds_j = p_j gate (<dO, v_j> - delta)
//   dq = scale sum_j ds_j k_j,   dk_j = scale sum ds_j q,   dv_j = sum p_j gate dO
// the last two sums over the rows that see key j.
//
// Grid: for dq, a warp for each row; for dk and dv, a block of threads for each key and KV head, each warp of it taking
// every fourth chunk of 32 rows. No atomics: the warps' sums are added in order. Shared memory as in the forward.
#pragma once

#include "common/plain/forward.cuh"

namespace nsa::plain {

// What a row brings to its gradients.
struct RowGradient {
  float lse;  // -inf: the row sees nothing
  float delta;
  float gate;
  float grad_lse;

  template <typename Params>
  __device__ RowGradient(const Params& params, int64_t batch, int32_t head, int64_t token)
      : lse(params.lse.at(batch, head, token)),
        delta(params.delta.at(batch, head, token)),
        gate(params.gate.data == nullptr ? 1.f : params.gate.at(batch, head, token)),
        grad_lse(params.grad_lse.data == nullptr ? 0.f : params.grad_lse.at(batch, head, token)) {}

  __device__ float p(float score) const { return expf(score - lse); }
  __device__ float grad_score(float p, float grad_p) const {
    return p > kWholeProbability<float> ? grad_lse : p * gate * (grad_p - delta);
  }
};

template <typename Branch, int kColumns>
__global__ void __launch_bounds__(kThreads, kBlocksPerSM)
    backward_query_plain(const __grid_constant__ typename Branch::Backward params) {
  __shared__ Staging stagings[kWarps];
  __shared__ __align__(16) float q_rows[kWarps][kColumns];
  __shared__ __align__(16) float grad_out_rows[kWarps][kColumns];
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
  load_vector<kColumns>(grad_out_rows[warp],
                        params.grad_out.template row<const float>(place.batch, row.token, row.head),
                        params.grad_out.width, lane, 32);
  const RowGradient gradient(params, place.batch, row.head, row.token);

  float grad_q[kColumns / 32] = {};
  const int64_t count = gradient.lse == kMinusInfinity ? 0 : seen.count;
  for (int64_t first = 0; first < count; first += 32) {
    const int32_t key = first + lane < count ? seen.at(static_cast<int32_t>(first + lane)) : -1;
    if (__ballot_sync(kAllLanes, key >= 0) == 0) {
      continue;
    }
    const float* k = nullptr;
    const float* v = nullptr;
    if (key >= 0) {
      k = params.k.template row<const float>(place.batch, keys.begin + key, row.head_kv);
      v = params.v.template row<const float>(place.batch, keys.begin + key, row.head_kv);
    }
    const float score = dot_with_row(q_rows[warp], k, params.k.width, stagings[warp], lane) * params.scale;
    const float grad_p = dot_with_row(grad_out_rows[warp], v, params.v.width, stagings[warp], lane);
    const float grad_score = key >= 0 ? gradient.grad_score(gradient.p(score), grad_p) : 0.f;
    add_rows(grad_q, 1.f, grad_score, k, params.k.width, lane);
  }

  float* to = params.grad_q.template row<float>(place.batch, row.token, row.head);
#pragma unroll
  for (int step = 0; step < kColumns / 32; ++step) {
    const int column = 32 * step + lane;
    if (column < params.grad_q.width) {
      to[column] = fmaf(grad_q[step], params.scale, params.add_to_grad_q ? to[column] : 0.f);
    }
  }
}

// Which packed sequence key `number` of all lies in: the last that starts at it or before it.
__device__ inline Tile find_key(const int32_t* starts, int32_t batch, int64_t keys_per_sequence, int64_t number) {
  if (starts == nullptr) {
    return {static_cast<int32_t>(number / keys_per_sequence), static_cast<int32_t>(number % keys_per_sequence)};
  }
  int32_t low = 0;
  int32_t high = batch - 1;
  while (low < high) {
    const int32_t middle = (low + high + 1) / 2;
    if (starts[middle] <= number) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return {low, static_cast<int32_t>(number - starts[low])};
}

template <typename Branch, int kColumns>
__global__ void __launch_bounds__(kThreads, kBlocksPerSM)
    backward_keys_plain(const __grid_constant__ typename Branch::Backward params) {
  __shared__ Staging stagings[kWarps];
  __shared__ __align__(16) float k_row[kColumns];
  __shared__ __align__(16) float v_row[kColumns];
  static_assert(2 * kColumns <= 32 * kPitch, "the warps' sums are staged where the rows were");
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / 32;
  const int lane = thread % 32;
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

  float grad_k[kColumns / 32] = {};
  float grad_v[kColumns / 32] = {};
  int64_t rows = 0;
  if (at.index < keys.length) {
    const auto seeing = Branch::queries_seeing(params, place, at.sequence, at.index, head_kv);
    rows = int64_t{seeing.count} * s.group;
    for (int64_t first = 32 * warp; first < rows; first += kThreads) {
      int32_t query = -1;
      int32_t head = 0;
      if (first + lane < rows) {
        const auto i = static_cast<uint32_t>(first + lane);
        const uint32_t pair = s.by_group.divide(i);
        query = seeing.at(static_cast<int32_t>(pair));
        head = head_kv * s.group + static_cast<int32_t>(i - pair * static_cast<uint32_t>(s.group));
      }
      const float* q = nullptr;
      const float* grad_out = nullptr;
      float p = 0.f;
      float grad_score = 0.f;
      const bool sees = query >= 0 && params.lse.at(place.batch, head, place.q_begin + query) != kMinusInfinity;
      if (__ballot_sync(kAllLanes, sees) == 0) {
        continue;
      }
      if (sees) {
        q = params.q.template row<const float>(place.batch, place.q_begin + query, head);
        grad_out = params.grad_out.template row<const float>(place.batch, place.q_begin + query, head);
      }
      const float score = dot_with_row(k_row, q, params.q.width, stagings[warp], lane) * params.scale;
      const float grad_p = dot_with_row(v_row, grad_out, params.grad_out.width, stagings[warp], lane);
      if (sees) {
        const RowGradient gradient(params, place.batch, head, place.q_begin + query);
        p = gradient.p(score);
        grad_score = gradient.grad_score(p, grad_p);
        p *= gradient.gate;
      }
      add_rows(grad_k, 1.f, grad_score, q, params.q.width, lane);
      add_rows(grad_v, 1.f, p, grad_out, params.grad_out.width, lane);
    }
  }

  __syncwarp();
#pragma unroll
  for (int step = 0; step < kColumns / 32; ++step) {
    stagings[warp][32 * step + lane] = grad_k[step];
    stagings[warp][kColumns + 32 * step + lane] = grad_v[step];
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
  float* to_k = params.grad_k.template row<float>(place.batch, token, head_kv);
  float* to_v = params.grad_v.template row<float>(place.batch, token, head_kv);
  for (int column = thread; column < params.grad_k.width; column += kThreads) {
    to_k[column] = total(column) * params.scale;
  }
  for (int column = thread; column < params.grad_v.width; column += kThreads) {
    to_v[column] = total(kColumns + column);
  }
}

// `num_keys`: dense, of every sequence; packed, of all.
template <typename Branch>
void launch_backward(const typename Branch::Backward& params, int64_t num_keys, cudaStream_t stream, const char* name) {
  const SequenceLayout& s = params.sequences;
  if (s.batch == 0) {
    return;
  }
  with_columns(name, params.q.width, params.v.width, [&](auto columns) {
    launch(backward_query_plain<Branch, columns()>, ceil_div(count_rows(s), kWarps), kThreads, 0, stream, name, params);
    launch(backward_keys_plain<Branch, columns()>, (s.packed() ? num_keys : s.batch * num_keys) * s.heads_kv, kThreads,
           0, stream, name, params);
  });
}

}  // namespace nsa::plain
