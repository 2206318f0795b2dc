#include "plans/instances.h"

#include "decode/tiles.h"
#include "gates/tiles.h"
#include "range/tiles.h"
#include "selected/tiles.h"
#include "selection/tiles.h"

namespace nsa {
namespace {

constexpr const char* kHalves[] = {"bfloat16", "float16"};
constexpr int64_t kListed = kMostSelected;  // blocks of the longest list that select_blocks makes

class Instances {
 public:
  std::vector<KernelInstance> all;

  void add(const std::string& kernel, TileDims dims, const KernelTile& tile, const std::string& variant = "") {
    for (const char* const element : kHalves) {
      all.push_back({kernel, element, dims.k, dims.v, variant, tile});
    }
  }
  void add_float(const std::string& kernel, int32_t columns, const std::string& variant, const KernelTile& tile) {
    all.push_back({kernel, "float32", columns, columns, variant, tile});
  }
  void add_any(const std::string& kernel, const KernelTile& tile = {}) {
    all.push_back({kernel, "any", 0, 0, "", tile});
  }
};

void add_plain(Instances& to) {
  for (const int32_t columns : plain::kColumns) {
    for (const char* const branch : {"range", "selected"}) {
      to.add_float("forward_plain", columns, branch, plain::forward_tile(columns));
      to.add_float("backward_query_plain", columns, branch, plain::backward_query_tile(columns));
      to.add_float("backward_keys_plain", columns, branch, plain::backward_keys_tile(columns));
    }
  }
  to.add_float("select_blocks_plain", kLargestHeadDim, "", select_plain::tile(kLargestHeadDim));
}

void add_portable(Instances& to, TileDims dims) {
  to.add("range_forward_sm80", dims, range_sm80::forward_tile(dims));
  to.add("range_backward_query_sm80", dims, range_sm80::backward_query_tile(dims));
  to.add("range_backward_keys_sm80", dims, key_gradients_sm80::tile(dims));
  to.add("range_add_partials_sm80", dims, {});
  for (int32_t stages = selected_sm80::least_stages(dims); stages <= selected_sm80::kMostStages; ++stages) {
    const std::string variant = "stages: " + std::to_string(stages);
    to.add("selected_forward_sm80", dims, selected_sm80::forward_tile(dims, stages, kListed), variant);
    to.add("selected_backward_query_sm80", dims, selected_sm80::backward_query_tile(dims, stages, kListed), variant);
  }
  to.add("selected_backward_keys_sm80", dims, key_gradients_sm80::tile(dims));
  to.add("selected_add_partials_sm80", dims, {});
  for (const int32_t queries : select_sm80::kQueries) {
    to.add("select_blocks_sm80", {dims.k, 0}, select_sm80::tile(dims.k, queries),
           "queries of a warp: " + std::to_string(queries));
  }
}

// The lists of those that walk unions are as long as the plan lets them be.
void add_hopper_unions(Instances& to, TileDims dims) {
  struct Variant {
    UnionKind kind;
    int32_t listed;
    const char* name;
  };
  constexpr int32_t kNarrow = selected_sm90::kMostNarrow;
  constexpr int32_t kLong = selected_sm90::kMostSelected;
  constexpr Variant kForward[] = {{UnionKind::kNarrow, kNarrow, "16 heads, short lists"},
                                  {UnionKind::kLong, kLong, "16 heads, long lists"},
                                  {UnionKind::kWide, kLong, "8 heads"},
                                  {UnionKind::kWidest, kNarrow, "4 heads, short lists"}};
  constexpr Variant kBackward[] = {{UnionKind::kNarrow, kNarrow, "16 heads, short lists"},
                                   {UnionKind::kWide, kLong, "8 heads, or long lists"}};
  for (const auto& [kind, listed, name] : kForward) {
    to.add("selected_forward_sm90", dims, selected_sm90::forward_tile(dims, kind, listed), name);
  }
  for (const auto& [kind, listed, name] : kBackward) {
    to.add("selected_backward_query_sm90", dims, selected_sm90::backward_query_tile(dims, kind, 1, listed), name);
    to.add("selected_query_handed_sm90", dims, selected_sm90::handed_tile(dims, kind, 1, listed), name);
  }
}

void add_hopper(Instances& to, TileDims dims) {
  to.add("range_forward_sm90", dims, range_sm90::forward_tile(dims));
  to.add("range_backward_query_sm90", dims, range_sm90::backward_query_tile(dims));
  to.add("range_backward_keys_sm90", dims, range_sm90::backward_keys_tile(dims));
  to.add("range_add_partials_sm90", dims, {});
  add_hopper_unions(to, dims);
  to.add("selected_backward_keys_sm90", dims, selected_sm90::backward_keys_tile(dims));
  for (const int32_t slot : select_sm90::kSlots) {
    for (const int32_t listed : select_sm90::kListed) {
      if (listed <= select_sm90::most_listed(dims.k, slot)) {
        to.add("select_blocks_sm90", {dims.k, 0}, select_sm90::tile(dims.k, slot, listed),
               std::to_string(slot) + " heads, " + std::to_string(listed) + " blocks");
      }
    }
  }
}

// Of a step: the splits and parts of a long sequence, with selection blocks of 64.
void add_decode(Instances& to) {
  constexpr int32_t kSplitKeys = 512;
  constexpr int32_t kFewKeys = 64;
  constexpr int32_t kWindowKeys = 128;
  constexpr int32_t kPartKeys = 256;
  for (const TileDims& dims : kTileDims) {
    for (const int32_t tiles : decode_sm80::kRowTiles) {
      const std::string rows = std::to_string(16 * tiles) + " rows";
      to.add("decode_ranges_sm80", dims, decode_sm80::ranges_tile(dims, tiles, kSplitKeys, kWindowKeys), rows);
      to.add("decode_ranges_sm80", dims, decode_sm80::ranges_tile(dims, tiles, kFewKeys, kWindowKeys), rows);
      to.add("decode_selected_sm80", dims, decode_sm80::selected_tile(dims, tiles, kPartKeys), rows);
    }
  }
  for (const TileDims& dims : kTileDims) {
    for (int32_t tiles = 1; has_sm90_kernels(dims.k) && tiles <= decode_sm90::most_row_tiles(dims); tiles *= 2) {
      const std::string rows = std::to_string(16 * tiles) + " rows";
      to.add("decode_ranges_sm90", dims, decode_sm90::ranges_tile(dims, tiles), rows);
      if (tiles <= decode_sm90::kMostSelectedRowTiles) {
        to.add("decode_selected_sm90", dims, decode_sm90::selected_tile(dims, tiles), rows);
      }
    }
  }
  to.add_any("decode_ranges_plain", decode_plain::ranges_tile(kLargestHeadDim, kSplitKeys, kWindowKeys));
  to.add_any("decode_selected_plain", decode_plain::selected_tile(kLargestHeadDim, kPartKeys));
  to.add_any("decode_choose", decode_tiles::choose_tile(16, 128, 1024));
}

void add_others(Instances& to) {
  to.add_any("combine_gates", gate_tiles::kCombine);
  to.add_any("gate_gradients", gate_tiles::kGradients);
  to.add_any("delta", gate_tiles::kDelta);
  to.add_any("count_segments", list_tiles::kCountSegments);
  to.add_any("list_pieces", list_tiles::kListPieces);
  for (const char* const none :
       {"list_pairs", "find_begins", "find_edges", "count_pieces", "gather_chunks", "scatter_chunks", "mean_forward",
        "mean_backward", "shift_and_add", "shift_and_spread", "sum_up_blocks", "fill_tables", "rotate_pairs",
        "cumulative_blocks", "fill_unused_rows"}) {
    to.add_any(none);
  }
}

}  // namespace

std::vector<KernelInstance> kernel_instances() {
  Instances instances;
  add_plain(instances);
  for (const TileDims& dims : kTileDims) {
    add_portable(instances, dims);
  }
  for (const TileDims& dims : kTileDims) {
    if (has_sm90_kernels(dims.k)) {
      add_hopper(instances, dims);
    }
  }
  add_decode(instances);
  add_others(instances);
  return instances.all;
}

}  // namespace nsa
