#include "compression/plan.h"

namespace nsa {
namespace {

constexpr const char* kMean = "without weights a kernel takes the mean of a block, and there is no product";
constexpr const char* kShared =
    "cuBLAS multiplies the chunks of all heads at once with the weight that they share, cut into the l/d parts of a "
    "block, on elements of the call's dtype with float32 sums";
constexpr const char* kPerHead =
    "cuBLAS multiplies the chunks of each head with its own weight, cut into the l/d parts of a block, on elements of "
    "the call's dtype with float32 sums";

// What lies between the products. A packed call finds its rows first.
void add_launches(CompressPlan& plan, bool packed, bool backward) {
  Launches& launches = plan.launches;
  if (packed) {
    launches.add("sum_up_blocks", {});
    launches.add("fill_tables", {});
  }
  if (plan.phi == Phi::kMean) {
    return launches.add(backward ? "mean_backward" : "mean_forward", {});
  }
  const bool mlp = plan.phi == Phi::kMlp;
  launches.add("gather_chunks", {});
  if (!backward) {
    return launches.add("shift_and_add", {}, mlp ? 2 : 1);
  }
  if (mlp) {
    launches.add("shift_and_add", {}, packed ? 2 : 1);  // the hidden layer; rows without a block are cleared
  }
  launches.add("shift_and_spread", {});
  launches.add("scatter_chunks", {});
}

// Chunks, their products, the hidden layer, the weight cut up; backward, what becomes their gradients. Biases are left
// out.
int64_t workspace(const CompressSizes& s, Phi phi, int64_t element, bool backward) {
  if (phi == Phi::kMean) {
    return 0;
  }
  const bool mlp = phi == Phi::kMlp;
  const int64_t of_chunks = s.chunks * s.heads * s.block_stride * s.width * element;
  const int64_t of_parts = s.chunks * s.heads * (s.block_size / s.block_stride) * s.hidden;
  const int64_t weight = s.block_size * s.width * s.hidden * (s.per_head_1 ? s.heads : 1) * element;
  const int64_t hidden = mlp ? s.blocks * s.heads * s.hidden : 0;
  if (!backward) {
    return of_chunks + weight + of_parts * 4 + hidden * element + (mlp ? s.blocks * s.heads * s.result * 4 : 0);
  }
  return 2 * of_chunks + weight + of_parts * element + (mlp ? of_parts * 4 + hidden * (element + 4) : 0);
}

}  // namespace

CompressPlan plan_compress(const CompressSizes& sizes, ElementType type, bool backward) {
  const int64_t element = type == ElementType::kFloat32 ? 4 : 2;
  CompressPlan plan{};
  plan.phi = sizes.phi;
  plan.why = kMean;
  if (plan.phi != Phi::kMean) {
    plan.first = sizes.per_head_1 ? Product::kPerHead : Product::kShared;
    plan.products = backward ? 2 : 1;
    plan.why = sizes.per_head_1 ? kPerHead : kShared;
  }
  if (plan.phi == Phi::kMlp) {
    plan.second = sizes.per_head_2 ? Product::kPerHead : Product::kShared;
    plan.products = backward ? 5 : 2;  // backward, the first is made again
  }
  plan.workspace_bytes = workspace(sizes, plan.phi, element, backward);
  add_launches(plan, sizes.packed, backward);
  return plan;
}

}  // namespace nsa
