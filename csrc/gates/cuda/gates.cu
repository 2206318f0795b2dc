// Gates, their gradients, and deltas (nsa/cuda/gates.cuh): which element type, and whether 16-byte loads will do.
#include <initializer_list>
#include <type_traits>

#include "common/launch.cuh"
#include "gates/cuda/gates.cuh"
#include "gates/cuda/launch.h"

namespace nsa {
namespace {

bool can_load_16_bytes(std::initializer_list<TensorView> tensors, int64_t elements) {
  for (const TensorView& t : tensors) {
    const bool aligned = reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && t.width % elements == 0 &&
                         t.batch_stride % elements == 0 && t.token_stride % elements == 0 &&
                         t.head_stride % elements == 0;
    if (!aligned) {
      return false;
    }
  }
  return true;
}

// Calls `run` with a zero of the element type and the number of elements that a load takes.
template <typename Run>
void dispatch(ElementType type, std::initializer_list<TensorView> tensors, const Run& run) {
  const auto with_vector = [&](auto zero) {
    constexpr int kMost = 16 / sizeof(zero);
    if (can_load_16_bytes(tensors, kMost)) {
      run(zero, std::integral_constant<int, kMost>());
    } else {
      run(zero, std::integral_constant<int, 1>());
    }
  };
  switch (type) {
    case ElementType::kFloat32:
      return with_vector(float{});
    case ElementType::kFloat16:
      return with_vector(Half{});
    case ElementType::kBFloat16:
      return with_vector(BFloat16{});
  }
}

int64_t count_blocks(const RowCounts& rows) {
  if (rows.heads == 0) {
    return 0;
  }
  const GateTiles tiles(rows);
  return rows.batch * static_cast<int64_t>(tiles.token_tiles) * tiles.head_tiles;
}

}  // namespace

void launch_combine_gates(const CombineGatesParams& params, ElementType type, cudaStream_t stream) {
  const auto& outs = params.outs;
  dispatch(type, {params.out, outs[0], outs[1], outs[2]}, [&](auto zero, auto vector) {
    launch(combine_gates<decltype(zero), vector()>, count_blocks(params.rows), kGateThreads, 0, stream, "gates",
           params);
  });
}

void launch_gate_gradients(const GateGradientsParams& params, ElementType type, cudaStream_t stream) {
  const auto& outs = params.outs;
  dispatch(type, {params.grad_out, outs[0], outs[1], outs[2]}, [&](auto zero, auto vector) {
    launch(gate_gradients<decltype(zero), vector()>, count_blocks(params.rows), kGateThreads, 0, stream,
           "gradients of the gates", params);
  });
}

void launch_delta(const DeltaParams& params, ElementType type, cudaStream_t stream) {
  dispatch(type, {params.grad_out, params.out}, [&](auto zero, auto vector) {
    launch(delta<decltype(zero), vector()>, count_blocks(params.rows), kGateThreads, 0, stream, "delta", params);
  });
}

}  // namespace nsa
