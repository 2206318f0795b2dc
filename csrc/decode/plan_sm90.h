// How a decoding step is cut on Hopper.
#pragma once

#include "decode/plan.h"

namespace nsa {

inline int64_t selection_blocks(const DecodeParams& p) { return ceil_div(p.max_tokens, p.select_size); }

// Why a step does not suit the kernels for Hopper, or null.
const char* not_for_decode_sm90(const DecodeParams& p, const Device& device);

// As plan_decode, for these kernels. False, with another kernel in the plan, where the choice has no room.
bool cut_decode_for_sm90(DecodePlan& plan, DecodeParams& p, int32_t num_splits, const Device& device);

}  // namespace nsa
