// Gates and row sums: reads every tensor once, and is bound by HBM.
//   combine:         out = sum_b gate_b out_b
//   gate_gradients:  d gate_b = <dO, out_b>,  delta_b = d gate_b in float32,  scale_b = gate_b
//   delta:           delta = <dO, out> - d lse
//
// Grid: a block of threads for a tile of tokens times heads, at most kRows rows; heads first, so that blocks walk
// through memory in order. Eight lanes share a row, and read 128 bytes of it at a time (kVector elements, 16 bytes,
// each; one element where rows aren't aligned). What is laid out as (B, Hq, Tq) is staged in shared memory and leaves
// token by token: eight heads of eight tokens fill whole sectors of 32 bytes.
#pragma once

#include "common/gates.cuh"
#include "gates/cuda/params.h"

namespace nsa {

constexpr unsigned kGateThreads = 256;
constexpr int kLanes = 8;
constexpr unsigned kRowsAtOnce = kGateThreads / kLanes;
constexpr unsigned kRows = gate_tiles::kRows;
constexpr unsigned kHeadsWanted = 8;

// Heads are shared out evenly to tiles of at most kHeadsWanted; tokens fill up the rest of kRows.
struct GateTiles {
  uint32_t heads;   // per tile
  uint32_t tokens;  // per tile
  uint32_t head_tiles;
  uint32_t token_tiles;

  NSA_HOST_DEVICE explicit GateTiles(const RowCounts& rows) {
    const auto all_heads = static_cast<uint32_t>(rows.heads);
    head_tiles = (all_heads + kHeadsWanted - 1) / kHeadsWanted;
    heads = (all_heads + head_tiles - 1) / head_tiles;
    tokens = kRows / heads;
    token_tiles = (static_cast<uint32_t>(rows.tokens) + tokens - 1) / tokens;
  }
};

// Rows of a tile are numbered token * heads + head. All counts are below 2^31.
struct GateTile {
  uint32_t heads;
  uint32_t tokens;
  uint32_t batch;
  uint32_t first_token;
  uint32_t first_head;
  uint32_t end_token;
  uint32_t end_head;

  __device__ explicit GateTile(const RowCounts& rows) {
    const GateTiles tiles(rows);
    const uint32_t token_tile = blockIdx.x / tiles.head_tiles;
    heads = tiles.heads;
    tokens = tiles.tokens;
    first_head = blockIdx.x % tiles.head_tiles * heads;
    first_token = token_tile % tiles.token_tiles * tokens;
    batch = token_tile / tiles.token_tiles;
    end_token = static_cast<uint32_t>(rows.tokens);
    end_head = static_cast<uint32_t>(rows.heads);
  }

  __device__ uint32_t rows() const { return heads * tokens; }
  __device__ uint32_t token(uint32_t row) const { return first_token + row / heads; }
  __device__ uint32_t head(uint32_t row) const { return first_head + row % heads; }
  __device__ bool contains(uint32_t row) const {
    return row < rows() && token(row) < end_token && head(row) < end_head;
  }

  // Calls visit(row, token, head) for the tile's rows, tokens side by side, by the whole block.
  template <typename Visit>
  __device__ void for_each_by_token(const Visit& visit) const {
    for (uint32_t i = threadIdx.x; i < rows(); i += kGateThreads) {
      const uint32_t row = i % tokens * heads + i / tokens;
      if (contains(row)) {
        visit(row, token(row), head(row));
      }
    }
  }
};

// kVector consecutive elements.
template <typename Element, int kVector>
struct alignas(sizeof(Element) * kVector) Vector {
  Element elements[kVector];

  __device__ static Vector load(const Element* from) { return *reinterpret_cast<const Vector*>(from); }
  __device__ void store(Element* to) const { *reinterpret_cast<Vector*>(to) = *this; }
};

__device__ inline void store_gate(const GatesView& gates, int64_t batch, int64_t token, int64_t head, int branch,
                                  float value) {
  const int64_t offset = gates.offset(batch, token, head, branch);
  switch (gates.type) {
    case ElementType::kFloat16:
      static_cast<Half*>(gates.data)[offset] = from_float<Half>(value);
      break;
    case ElementType::kBFloat16:
      static_cast<BFloat16*>(gates.data)[offset] = from_float<BFloat16>(value);
      break;
    default:
      static_cast<float*>(gates.data)[offset] = value;
  }
}

template <typename Element, int kVector>
__global__ void __launch_bounds__(kGateThreads) combine_gates(const __grid_constant__ CombineGatesParams params) {
  const GateTile tile(params.rows);
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
#pragma unroll 1
  for (uint32_t row = threadIdx.x / kLanes; row < kRows; row += kRowsAtOnce) {
    if (!tile.contains(row)) {
      continue;
    }
    const int64_t token = tile.token(row);
    const int64_t head = tile.head(row);
    float gates[kBranches];
    const Element* from[kBranches];
#pragma unroll
    for (int b = 0; b < kBranches; ++b) {
      gates[b] = load_gate(params.gates, tile.batch, token, head, b);
      from[b] = params.outs[b].row<const Element>(tile.batch, token, head);
    }
    Element* const to = params.out.row<Element>(tile.batch, token, head);
#pragma unroll 2
    for (int column = kVector * lane; column < params.out.width; column += kVector * kLanes) {
      Vector<Element, kVector> in[kBranches];
#pragma unroll
      for (int b = 0; b < kBranches; ++b) {
        in[b] = Vector<Element, kVector>::load(from[b] + column);
      }
      Vector<Element, kVector> out;
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        float sum = gates[0] * to_float(in[0].elements[i]);
#pragma unroll
        for (int b = 1; b < kBranches; ++b) {
          sum = fmaf(gates[b], to_float(in[b].elements[i]), sum);
        }
        out.elements[i] = from_float<Element>(sum);
      }
      out.store(to + column);
    }
  }
}

// products[b][row] = <dO, outs[b]> for all rows of the tile; 0 for those that it lacks.
template <typename Element, int kVector, int kCount>
__device__ inline void multiply_rows(float (&products)[kCount][kRows], const GateTile& tile, const TensorView& grad_out,
                                     const TensorView (&outs)[kCount]) {
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
#pragma unroll 1
  for (uint32_t row = threadIdx.x / kLanes; row < kRows; row += kRowsAtOnce) {
    float sums[kCount] = {};
    if (tile.contains(row)) {
      const int64_t token = tile.token(row);
      const int64_t head = tile.head(row);
      const Element* const grad = grad_out.row<const Element>(tile.batch, token, head);
      const Element* from[kCount];
#pragma unroll
      for (int b = 0; b < kCount; ++b) {
        from[b] = outs[b].template row<const Element>(tile.batch, token, head);
      }
#pragma unroll 2
      for (int column = kVector * lane; column < grad_out.width; column += kVector * kLanes) {
        const auto left = Vector<Element, kVector>::load(grad + column);
        Vector<Element, kVector> right[kCount];
#pragma unroll
        for (int b = 0; b < kCount; ++b) {
          right[b] = Vector<Element, kVector>::load(from[b] + column);
        }
#pragma unroll
        for (int b = 0; b < kCount; ++b) {
#pragma unroll
          for (int i = 0; i < kVector; ++i) {
            sums[b] = fmaf(to_float(left.elements[i]), to_float(right[b].elements[i]), sums[b]);
          }
        }
      }
    }
#pragma unroll
    for (int b = 0; b < kCount; ++b) {
#pragma unroll
      for (int offset = kLanes / 2; offset > 0; offset /= 2) {
        sums[b] += __shfl_xor_sync(0xffffffffu, sums[b], offset);
      }
      if (lane == 0) {
        products[b][row] = sums[b];
      }
    }
  }
}

template <typename Element, int kVector>
__global__ void __launch_bounds__(kGateThreads) gate_gradients(const __grid_constant__ GateGradientsParams params) {
  __shared__ float products[kBranches][kRows];
  __shared__ float gates[kBranches][kRows];
  const GateTile tile(params.rows);
  multiply_rows<Element, kVector>(products, tile, params.grad_out, params.outs);
  __syncthreads();
  for (uint32_t i = threadIdx.x; i < kBranches * tile.rows(); i += kGateThreads) {
    const uint32_t row = i / kBranches;
    const int b = static_cast<int>(i % kBranches);
    if (tile.contains(row)) {
      gates[b][row] = load_gate(params.gates, tile.batch, tile.token(row), tile.head(row), b);
      store_gate(params.grad_gates, tile.batch, tile.token(row), tile.head(row), b, products[b][row]);
    }
  }
  __syncthreads();
  tile.for_each_by_token([&](uint32_t row, int64_t token, int64_t head) {
#pragma unroll
    for (int b = 0; b < kBranches; ++b) {
      params.deltas[b].at(tile.batch, head, token) = products[b][row];
      params.scales[b].at(tile.batch, head, token) = gates[b][row];
    }
  });
}

template <typename Element, int kVector>
__global__ void __launch_bounds__(kGateThreads) delta(const __grid_constant__ DeltaParams params) {
  __shared__ float products[1][kRows];
  const GateTile tile(params.rows);
  const TensorView outs[1] = {params.out};
  multiply_rows<Element, kVector>(products, tile, params.grad_out, outs);
  __syncthreads();
  tile.for_each_by_token([&](uint32_t row, int64_t token, int64_t head) {
    const float grad_lse = params.grad_lse.data == nullptr ? 0.f : params.grad_lse.at(tile.batch, head, token);
    params.delta.at(tile.batch, head, token) = products[0][row] - grad_lse;
  });
}

}  // namespace nsa
