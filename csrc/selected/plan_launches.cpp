#include "selected/plan_launches.h"

#include "common/dispatch.h"

namespace nsa {
namespace {

using TokenTile = KernelTile (*)(TileDims dims, int32_t stages, int64_t num_selected);

// With as many stages as fit the device, of those that there are kernels with.
KernelTile token_tile(TokenTile tile_of, TileDims dims, int64_t num_selected, const Device& device) {
  const KernelTile most = tile_of(dims, selected_sm80::kMostStages, num_selected);
  return most.shared_bytes() <= device.shared_bytes ? most
                                                    : tile_of(dims, selected_sm80::least_stages(dims), num_selected);
}

KernelTile forward_tile_of(const SelectedForwardParams& params, const SelectedForwardPlan& plan, const Device& device) {
  const TileDims dims = tile_dims(params.q.width, params.v.width);
  switch (plan.kernel.machine) {
    case Machine::kPlain:
      return plain::forward_tile(plain::columns(params.q.width, params.v.width));
    case Machine::kSm80:
      return token_tile(selected_sm80::forward_tile, dims, params.num_selected, device);
    default:
      return selected_sm90::forward_tile(dims, plan.kind, params.num_selected);
  }
}

KernelTile query_tile_of(const SelectedBackwardParams& params, const SelectedBackwardPlan& plan, const Device& device) {
  const TileDims dims = tile_dims(params.q.width, params.v.width);
  const int32_t group = params.sequences.group;
  switch (plan.query.machine) {
    case Machine::kPlain:
      return plain::backward_query_tile(plain::columns(params.q.width, params.v.width));
    case Machine::kSm80:
      return token_tile(selected_sm80::backward_query_tile, dims, params.num_selected, device);
    default:
      return plan.handed_heads > 0 ? selected_sm90::handed_tile(dims, plan.kind, group, params.num_selected)
                                   : selected_sm90::backward_query_tile(dims, plan.kind, group, params.num_selected);
  }
}

KernelTile keys_tile(const SelectedBackwardParams& params, Machine machine) {
  const TileDims dims = tile_dims(params.q.width, params.v.width);
  return machine == Machine::kPlain  ? plain::backward_keys_tile(plain::columns(params.q.width, params.v.width))
         : machine == Machine::kSm80 ? key_gradients_sm80::tile(dims)
                                     : selected_sm90::backward_keys_tile(dims);
}

constexpr KernelNames kForward{"forward_plain", "selected_forward_sm80", "selected_forward_sm90"};
constexpr KernelNames kQuery{"backward_query_plain", "selected_backward_query_sm80", "selected_backward_query_sm90"};
constexpr KernelNames kKeys{"backward_keys_plain", "selected_backward_keys_sm80", "selected_backward_keys_sm90"};

// Turning the lists round (selected/cuda/lists.cu).
void add_lists(Launches& launches, bool by_pieces) {
  launches.add("list_pairs", {});
  if (by_pieces) {
    launches.add("find_edges", {});
    launches.add("count_pieces", {});
    launches.add("list_pieces", list_tiles::kListPieces);
  } else {
    launches.add("find_begins", {});
    launches.add("count_segments", list_tiles::kCountSegments);
  }
}

}  // namespace

void set_launches(SelectedForwardPlan& plan, const SelectedForwardParams& params, const Device& device) {
  plan.tile = forward_tile_of(params, plan, device);
  plan.launches.add(kForward.on(plan.kernel.machine), plan.tile);
}

void set_launches(SelectedBackwardPlan& plan, const SelectedBackwardParams& params, int64_t pairs,
                  const Device& device) {
  plan.query_tile = query_tile_of(params, plan, device);
  const KernelTile keys = keys_tile(params, plan.keys.machine);
  const int64_t launches = plan.keys_heads > 0 ? ceil_div(params.sequences.heads_kv, plan.keys_heads) : 1;
  if (plan.needed.keys) {
    add_lists(plan.launches, plan.keys_heads > 0);
  }
  if (plan.handed_heads > 0) {
    plan.launches.add(kKeys.sm90, keys, launches);
    plan.launches.add("selected_query_handed_sm90", plan.query_tile, launches);
    return;
  }
  if (plan.needed.query) {
    plan.launches.add(kQuery.on(plan.query.machine), plan.query_tile);
  }
  if (!plan.needed.keys) {
    return;
  }
  plan.launches.add(kKeys.on(plan.keys.machine), keys, launches);
  if (plan.keys.machine == Machine::kSm80 && pairs >= plan.segment) {
    plan.launches.add("selected_add_partials_sm80", {});
  }
}

int64_t most_listed(int64_t head_dim, int64_t v_head_dim, ElementType type, const Device& device) {
  constexpr int64_t kMost = 0x7fffffff;
  const TileDims dims = tile_dims(static_cast<int32_t>(head_dim), static_cast<int32_t>(v_head_dim));
  const int64_t others = selected_sm80::most_bytes(dims, selected_sm80::least_stages(dims), 0);
  return type == ElementType::kFloat32 ? kMost : (device.shared_bytes - others) / selected_sm80::list_bytes(1);
}

}  // namespace nsa
