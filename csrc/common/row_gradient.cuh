// What a row brings to the gradients of its scores.
#pragma once

#include "common/params.h"
#include "common/rows.cuh"

namespace nsa {

struct RowGradient {
  float lse;  // -inf: the row sees nothing
  float delta;
  float gate;
  float grad_lse;

  RowGradient() = default;
  template <typename Params>
  __device__ RowGradient(const Params& params, int64_t batch, int32_t head, int64_t token)
      : lse(params.lse.at(batch, head, token)),
        delta(params.delta.at(batch, head, token)),
        gate(params.gate.data == nullptr ? 1.f : params.gate.at(batch, head, token)),
        grad_lse(params.grad_lse.data == nullptr ? 0.f : params.grad_lse.at(batch, head, token)) {}

  // Of a score with probability p, whose <dO, v> is grad_p; of the scaled score.
  template <typename Element>
  __device__ float grad_score(float p, float grad_p) const {
    return p > kWholeProbability<Element> ? grad_lse : p * gate * (grad_p - delta);
  }
};

}  // namespace nsa
