// What tests of selected attention's gradient of q on Hopper share: the problem, and a plain float64 kernel.
#pragma once

#include "selected/launch_query_sm90.cuh"
#include "selected/launch_sm80.cuh"
#include "selected_problem.h"

namespace nsa_tests {

// Calls with the tile dimensions; NSA_ONLY_128 leaves all but one out, for short builds.
template <typename Function>
void with_test_dims(int32_t dim_k, int32_t dim_v, const Function& function) {
#if defined(NSA_ONLY_128)
  function(std::integral_constant<int, 128>(), std::integral_constant<int, 128>());
#else
  with_tile_dims(dim_k, dim_v, function);
#endif
}

// One block of threads per (sampled query of the batch, head).
template <typename Element>
__global__ void plain_backward_query(SelectedBackwardParams p, const int32_t* sample, float* grad_q) {
  extern __shared__ double grads[];
  const int heads = p.sequences.heads_kv * p.sequences.group;
  const int64_t token = sample[blockIdx.x / heads];
  const int head = static_cast<int>(blockIdx.x % heads);
  const int head_kv = head / p.sequences.group;
  const Tile at = find_query(p.sequences, token);
  const SequencePlace place = place_of(p.sequences, at.sequence);
  const int limit = min(place.offset + at.index + 1, place.k_length);
  const int32_t* list = p.block_indices + (token * p.sequences.heads_kv + head_kv) * p.num_selected;
  const int keys = p.num_selected * p.select_size;
  const auto key_of = [&](int i) -> int64_t {
    const int block = list[i / p.select_size];
    const int64_t key = block < 0 ? limit : int64_t{block} * p.select_size + i % p.select_size;
    return key < limit ? key : -1;
  };
  const int64_t query = place.q_begin + at.index;
  const Element* q = p.q.row<Element>(place.batch, query, head);
  const Element* grad_out = p.grad_out.row<Element>(place.batch, query, head);
  const double lse = p.lse.at(place.batch, head, query);
  const double delta = p.delta.at(place.batch, head, query);
  const double gate = p.gate.data == nullptr ? 1. : p.gate.at(place.batch, head, query);
  const double grad_lse = p.grad_lse.data == nullptr ? 0. : p.grad_lse.at(place.batch, head, query);
  for (int i = threadIdx.x; i < keys; i += blockDim.x) {
    const int64_t key = key_of(i);
    grads[i] = 0;
    if (key >= 0) {
      const Element* k = p.k.row<Element>(place.batch, place.k_begin + key, head_kv);
      const Element* v = p.v.row<Element>(place.batch, place.k_begin + key, head_kv);
      double score = 0;
      double grad = 0;
      for (int d = 0; d < p.q.width; ++d) {
        score += double{to_float(q[d])} * to_float(k[d]);
      }
      for (int d = 0; d < p.v.width; ++d) {
        grad += double{to_float(grad_out[d])} * to_float(v[d]);
      }
      const double probability = exp(score * p.scale - lse);
      grads[i] = probability > kWholeProbability<Element> ? grad_lse : probability * gate * (grad - delta);
    }
  }
  __syncthreads();
  for (int d = threadIdx.x; d < p.q.width; d += blockDim.x) {
    double sum = 0;
    for (int i = 0; i < keys; ++i) {
      if (key_of(i) >= 0) {
        sum += grads[i] * to_float(p.k.row<Element>(place.batch, place.k_begin + key_of(i), head_kv)[d]);
      }
    }
    grad_q[blockIdx.x * int64_t{p.q.width} + d] = static_cast<float>(sum * p.scale);
  }
}

// delta = <dO, O> - grad_lse / gate, by one warp for each row.
template <typename Element>
__global__ void fill_delta(SelectedBackwardParams p, TensorView out, int64_t tokens) {
  const int heads = p.sequences.heads_kv * p.sequences.group;
  const int64_t row = blockIdx.x * int64_t{blockDim.x} / 32 + threadIdx.x / 32;
  if (row >= tokens * heads) {
    return;
  }
  const Tile at = find_query(p.sequences, row / heads);
  const SequencePlace place = place_of(p.sequences, at.sequence);
  const int head = static_cast<int>(row % heads);
  const int64_t query = place.q_begin + at.index;
  float sum = 0.f;
  for (int d = threadIdx.x % 32; d < out.width; d += 32) {
    sum += to_float(out.row<Element>(place.batch, query, head)[d]) *
           to_float(p.grad_out.row<Element>(place.batch, query, head)[d]);
  }
  for (int bit = 16; bit > 0; bit /= 2) {
    sum += __shfl_xor_sync(0xffffffffu, sum, bit);
  }
  const float gate = p.gate.data == nullptr ? 1.f : p.gate.at(place.batch, head, query);
  const float grad_lse = p.grad_lse.data == nullptr ? 0.f : p.grad_lse.at(place.batch, head, query);
  p.delta.at(place.batch, head, query) = sum - grad_lse / gate;
}

__global__ void fill_gate(float* gate, int64_t count) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < count; i += int64_t{gridDim.x} * blockDim.x) {
    gate[i] = 0.1f + static_cast<float>(i * 7919 % 1000) / 1100.f;
  }
}

template <typename Shape>
void launch_query_sm80(const SelectedBackwardParams& b) {
  launch_per_token(selected_backward_query<Shape>, Shape::kThreads,
                   selected_backward_query_shared_bytes<Shape>(b.num_selected), nullptr, "sm80", b);
}

template <typename Element>
struct BackwardProblem : Problem<Element> {
  using Base = Problem<Element>;
  Device<Element> grad_out, grad_q;
  Device<float> delta, gate, grad_lse;
  SelectedBackwardParams b{};

  BackwardProblem(const Case& c, bool gated)
      : Base(c),
        grad_out(this->out.size),
        grad_q(this->q.size),
        delta(this->lse.size),
        gate(gated ? this->lse.size : 0),
        grad_lse(gated ? this->lse.size : 0) {
    fill_normal<<<1024, 256>>>(grad_out.data, grad_out.size, 4);
    const auto& p = this->p;
    b.sequences = p.sequences;
    b.scale = p.scale;
    b.select_size = p.select_size;
    b.num_selected = p.num_selected;
    b.block_indices = p.block_indices;
    b.q = p.q;
    b.k = p.k;
    b.v = p.v;
    b.grad_out = p.out;
    b.grad_out.data = grad_out.data;
    b.grad_q = p.q;
    b.grad_q.data = grad_q.data;
    b.lse = p.lse;
    b.delta = b.gate = b.grad_lse = p.lse;
    b.delta.data = delta.data;
    b.gate.data = b.grad_lse.data = nullptr;
    if (gated) {
      fill_gate<<<256, 256>>>(gate.data, gate.size);
      fill_normal<<<256, 256>>>(grad_lse.data, grad_lse.size, 5);
      b.gate.data = gate.data;
      b.grad_lse.data = grad_lse.data;
    }
    forward80();
    fill_delta<Element>
        <<<static_cast<unsigned>(ceil_div(this->tokens_q * this->heads, 8)), 256>>>(b, p.out, this->tokens_q);
    check_cuda(cudaDeviceSynchronize(), "set up");
  }

  void forward80() {
    with_test_dims(this->c.dk, this->c.dv, [&](auto dk, auto dv) {
      if constexpr (dk <= 192) {
        launch_selected_forward_sm80<Element, dk, dv>(this->p, nullptr);
      }
    });
  }
  void launch90() {
    with_test_dims(this->c.dk, this->c.dv, [&](auto dk, auto dv) {
      if constexpr (dk <= 192) {
        if (!try_selected_backward_query_sm90<Element, dk, dv>(b, nullptr)) {
          throw std::runtime_error("not taken");
        }
      }
    });
  }
  void launch80() {
    with_test_dims(this->c.dk, this->c.dv, [&](auto dk, auto dv) {
      if constexpr (dk <= 192) {
        launch_query_sm80<TokenShape<Element, dk, dv, 2>>(b);
      }
    });
  }
};

}  // namespace nsa_tests
