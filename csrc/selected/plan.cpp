#include "selected/plan.h"

#include "common/dispatch.h"
#include "selected/pieces.h"
#include "selected/plan_launches.h"

namespace nsa {
namespace {

using selected_sm90::kBlockKeys;
using selected_sm90::kMostNarrow;

int64_t tile_k(const TensorView& q, const TensorView& v) { return tile_dims(q.width, v.width).k; }

int64_t count_queries(const SequenceLayout& s) { return s.packed() ? s.length_q : s.batch * s.length_q; }

// What all kernels for Hopper ask of a call.
const char* not_for_sm90(const SequenceLayout& s, int32_t select_size, const TensorView& q, const TensorView& k,
                         const TensorView& v) {
  if (select_size != kBlockKeys) {
    return "selection blocks of other sizes than 64 have no kernel for compute capability 9.0";
  }
  if (!has_sm90_kernels(static_cast<int32_t>(tile_k(q, v)))) {
    return kDimsTooLarge;
  }
  if (s.length_k <= 0) {
    return kNoKeys;
  }
  if (!copies_rows(s, q) || !copies_keys(s, k, s.length_k) || !copies_keys(s, v, s.length_k)) {
    return kNotCopied;
  }
  return nullptr;
}

// What those ask that walk unions of lists.
const char* union_not_for_sm90(const SequenceLayout& s, int32_t select_size, int32_t num_selected, const TensorView& q,
                               const TensorView& k, const TensorView& v) {
  if (num_selected > selected_sm90::kMostSelected) {
    return "lists of more than 64 blocks have no kernel for compute capability 9.0";
  }
  if (s.length_k > int64_t{selected_sm90::kMostBlocks} * kBlockKeys) {
    return "more than 2^22 keys have no kernel for compute capability 9.0";
  }
  return not_for_sm90(s, select_size, q, k, v);
}

// Whether 16 bits hold a tile's tokens, and lists are short.
bool is_narrow(const SequenceLayout& s, int32_t num_selected) { return s.group > 8 && num_selected <= kMostNarrow; }

UnionKind forward_kind(const SequenceLayout& s, int32_t num_selected) {
  if (is_narrow(s, num_selected)) {
    return UnionKind::kNarrow;
  }
  if (s.group > 8) {
    return UnionKind::kLong;
  }
  const bool few_blocks = s.length_k <= int64_t{selected_sm90::kMostWidestBlocks} * kBlockKeys;
  return s.group <= 4 && num_selected <= kMostNarrow && few_blocks ? UnionKind::kWidest : UnionKind::kWide;
}

const char* keys_not_for_sm90(const SelectedBackwardParams& params) {
  const SequenceLayout& s = params.sequences;
  const int32_t rows = selected_sm90::key_step_rows(static_cast<int32_t>(tile_k(params.q, params.v)));
  if (s.group < 4 || rows / s.group * s.group < rows / 4 * 3) {
    return "the heads of a group would leave a quarter of the rows of a step empty, or are fewer than 4";
  }
  if (params.scale == 0.f) {
    return "a scale of 0 has no kernel for compute capability 9.0";
  }
  if (const char* why = not_for_sm90(s, params.select_size, params.q, params.k, params.v)) {
    return why;
  }
  return copies_rows(s, params.grad_out) ? nullptr : kNotCopied;
}

const char* query_not_for_sm90(const SelectedBackwardParams& params) {
  const SequenceLayout& s = params.sequences;
  if (const char* why = union_not_for_sm90(s, params.select_size, params.num_selected, params.q, params.k, params.v)) {
    return why;
  }
  return copies_rows(s, params.grad_out) ? nullptr : kNotCopied;
}

// Floats of the sums of one KV head's blocks.
int64_t head_sums(const SelectedBackwardParams& params) {
  return params.chosen_by.blocks / params.sequences.heads_kv * kBlockKeys *
         tile_row_size(params.q.width, params.v.width);
}

// KV heads of a launch by pieces, whose sums take up to half a GB.
int32_t heads_by_pieces(const SelectedBackwardParams& params) {
  constexpr int64_t kMostFloats = int64_t{1} << 27;
  const int64_t floats = max_of(head_sums(params), 1);
  return static_cast<int32_t>(min_of(max_of(kMostFloats / floats, 1), params.sequences.heads_kv));
}

int64_t handed_head_bytes(const SelectedBackwardParams& params) {
  return count_queries(params.sequences) * params.num_selected * HandedScores::units(params.sequences.group) * 32;
}

// KV heads that are handed over at a time; 0 where one takes too much: more than 2 GB, and than q twice.
int32_t heads_handed(const SelectedBackwardParams& params) {
  const SequenceLayout& s = params.sequences;
  const int64_t twice_q = count_queries(s) * s.heads_kv * s.group * params.q.width * 4;
  const int64_t head = max_of(handed_head_bytes(params), 1);
  const int64_t least = head <= int64_t{1} << 31 ? 1 : 0;
  return static_cast<int32_t>(min_of(max_of(max_of(twice_q, int64_t{1} << 30) / head, least), s.heads_kv));
}

// Enough segments for every multiprocessor to have several, so that the long lists of the first blocks hold nobody up.
int32_t longest_segment(int64_t pairs, const Device& device) {
  constexpr int64_t kSegmentsPerMultiprocessor = 8;
  constexpr int64_t kLeastQueries = 256;
  return static_cast<int32_t>(
      max_of(ceil_div(pairs, kSegmentsPerMultiprocessor * device.multiprocessors), kLeastQueries));
}

// Only blocks of more than one segment have partial sums: fewer than twice the full segments of all pairs.
int64_t segment_sums(const SelectedBackwardParams& params, int64_t pairs, int32_t segment) {
  const int64_t tiles = ceil_div(params.select_size, kKeysPerGradientTile);
  return 2 * (pairs / segment) * tiles * kKeysPerGradientTile * tile_row_size(params.q.width, params.v.width);
}

// What the gradients of keys by pieces need.
void share_out_pieces(SelectedBackwardPlan& plan, const SelectedBackwardParams& params, int64_t pairs,
                      const Device& device) {
  plan.keys_heads = heads_by_pieces(params);
  if (plan.needed.query && plan.query.machine == Machine::kSm90) {
    plan.handed_heads = static_cast<int32_t>(min_of(heads_handed(params), plan.keys_heads));
  }
  if (plan.handed_heads > 0) {
    constexpr int64_t kEnd = 4096;  // bytes after the last that rows of no head may read
    plan.keys_heads = plan.handed_heads;
    plan.handed_bytes = plan.handed_heads * handed_head_bytes(params) + kEnd;
  }
  plan.pieces =
      plan_key_pieces(params.sequences, params.num_selected, pairs, params.chosen_by.blocks,
                      int64_t{2} * (params.q.width + params.v.width), plan.keys_heads, device.multiprocessors);
  plan.partial_floats = plan.keys_heads * head_sums(params);
}

}  // namespace

SelectedForwardPlan plan_selected_forward(const SelectedForwardParams& params, ElementType type, const Device& device) {
  const char* why = params.scale == 0.f ? "a scale of 0 has no kernel for compute capability 9.0"
                                        : union_not_for_sm90(params.sequences, params.select_size, params.num_selected,
                                                             params.q, params.k, params.v);
  SelectedForwardPlan plan{.kernel = choose_kernel(type, device, why),
                           .kind = forward_kind(params.sequences, params.num_selected),
                           .tile = {},
                           .launches = {}};
  set_launches(plan, params, device);
  return plan;
}

SelectedBackwardPlan plan_selected_backward(const SelectedBackwardParams& params, ElementType type,
                                            const Device& device, NeededGradients needed) {
  const SequenceLayout& s = params.sequences;
  SelectedBackwardPlan plan{};
  plan.needed = needed;
  plan.query = choose_kernel(type, device, query_not_for_sm90(params));
  plan.keys = choose_kernel(type, device, keys_not_for_sm90(params));
  plan.kind = is_narrow(s, params.num_selected) ? UnionKind::kNarrow : UnionKind::kWide;
  const int64_t pairs = count_queries(s) * s.heads_kv * params.num_selected;
  plan.segment = longest_segment(pairs, device);
  if (needed.keys && plan.keys.machine == Machine::kSm80) {
    plan.partial_floats = segment_sums(params, pairs, plan.segment);
  } else if (needed.keys && plan.keys.machine == Machine::kSm90) {
    share_out_pieces(plan, params, pairs, device);
  }
  set_launches(plan, params, pairs, device);
  return plan;
}

}  // namespace nsa
