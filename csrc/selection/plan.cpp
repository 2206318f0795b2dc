#include "selection/plan.h"

#include "common/dispatch.h"

namespace nsa {
namespace {

const char* not_for_sm90(const SelectBlocksParams& params, const SelectBlocksPlan& plan) {
  const SequenceLayout& s = params.sequences;
  const int32_t tile_k = tile_dims(params.q.width, 0).k;
  if (s.group > select_sm90::kMostHeads) {
    return "a group of more than 128 heads has no kernel for compute capability 9.0";
  }
  if (!has_sm90_kernels(tile_k)) {
    return "head dimensions above 192 have no kernel for compute capability 9.0";
  }
  if (params.num_selected > select_sm90::most_listed(tile_k, plan.slot)) {
    return "groups of up to 4 heads of more than 128 have no kernel for lists of more than 32 blocks on compute "
           "capability 9.0";
  }
  if (params.num_keys <= 0) {
    return kNoKeys;
  }
  if (!copies_rows(s, params.q) || !copies_keys(s, params.k, params.num_keys)) {
    return kNotCopied;
  }
  return nullptr;
}

constexpr KernelNames kNames{"select_blocks_plain", "select_blocks_sm80", "select_blocks_sm90"};

// Of a block of threads; of large groups several warps, or slots, share a query.
KernelTile tile_of(const SelectBlocksParams& params, const SelectBlocksPlan& plan) {
  const int32_t group = params.sequences.group;
  const int32_t tile_k = tile_dims(params.q.width, 0).k;
  if (plan.kernel.machine == Machine::kPlain) {
    return select_plain::tile(params.k.width);
  }
  const bool hopper = plan.kernel.machine == Machine::kSm90;
  KernelTile tile = hopper ? select_sm90::tile(tile_k, plan.slot, plan.listed)
                           : select_sm80::tile(tile_k, select_sm80::queries(group));
  tile.rows /= static_cast<int32_t>(ceil_div(group, hopper ? plan.slot : select_sm80::kHeadsPerWarp));
  return tile;
}

}  // namespace

SelectBlocksPlan plan_select_blocks(const SelectBlocksParams& params, ElementType type, const Device& device) {
  const int32_t group = params.sequences.group;
  SelectBlocksPlan plan{};
  plan.slot = group <= 4 ? 4 : group <= 8 ? 8 : select_sm90::kLargestSlot;
  plan.listed = params.num_selected <= 16 ? 16 : params.num_selected <= 32 ? 32 : select_sm90::kMostListed;
  plan.kernel = choose_kernel(type, device, not_for_sm90(params, plan));
  plan.launches.add(kNames.on(plan.kernel.machine), tile_of(params, plan));
  return plan;
}

}  // namespace nsa
