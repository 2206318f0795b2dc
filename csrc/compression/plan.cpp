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

// Whether chunks are read, for the first layer's products.
bool gathers_chunks(Phi phi, const std::optional<PhiMask>& backward) {
  if (phi == Phi::kMean || !backward.has_value()) {
    return phi != Phi::kMean;
  }
  return phi == Phi::kMlp ? backward->w2 || backward->first() : backward->w1;
}

void add_backward(CompressPlan& plan, bool packed, const PhiMask& wanted) {
  Launches& launches = plan.launches;
  if (plan.phi == Phi::kMean) {
    if (wanted.x) {
      launches.add("mean_backward", {});
    }
    return;
  }
  const bool mlp = plan.phi == Phi::kMlp;
  if (plan.gathers) {
    launches.add("gather_chunks", {});
  }
  // The hidden layer; rows without a block are cleared.
  if (const int shifts = (mlp && wanted.w2 ? 1 : 0) + (mlp && packed ? 1 : 0)) {
    launches.add("shift_and_add", {}, shifts);
  }
  if (wanted.first()) {
    launches.add("shift_and_spread", {});
  }
  if (wanted.x) {
    launches.add("scatter_chunks", {});
  }
}

// What lies between the products. A packed call finds its rows first.
void add_launches(CompressPlan& plan, bool packed, const std::optional<PhiMask>& backward) {
  Launches& launches = plan.launches;
  if (packed) {
    launches.add("sum_up_blocks", {});
    launches.add("fill_tables", {});
  }
  if (backward.has_value()) {
    return add_backward(plan, packed, *backward);
  }
  if (plan.phi == Phi::kMean) {
    return launches.add("mean_forward", {});
  }
  launches.add("gather_chunks", {});
  launches.add("shift_and_add", {}, plan.phi == Phi::kMlp ? 2 : 1);
}

// Of the gradients, or of the result.
int32_t count_products(Phi phi, bool gathers, const std::optional<PhiMask>& backward) {
  const bool mlp = phi == Phi::kMlp;
  if (phi == Phi::kMean || !backward.has_value()) {
    return phi == Phi::kMean ? 0 : mlp ? 2 : 1;
  }
  const int32_t of_second = mlp ? (gathers ? 1 : 0) + (backward->w2 ? 1 : 0) + (backward->first() ? 1 : 0) : 0;
  return of_second + (backward->x ? 1 : 0) + (backward->w1 ? 1 : 0);
}

// Chunks, their products, the hidden layer, the weight cut up; backward, what becomes their gradients. Biases are left
// out.
int64_t workspace(const CompressSizes& s, const CompressPlan& plan, int64_t element,
                  const std::optional<PhiMask>& backward) {
  if (plan.phi == Phi::kMean) {
    return 0;
  }
  const bool mlp = plan.phi == Phi::kMlp;
  const int64_t of_chunks = s.chunks * s.heads * s.block_stride * s.width * element;
  const int64_t of_parts = s.chunks * s.heads * (s.block_size / s.block_stride) * s.hidden;
  const int64_t weight = s.block_size * s.width * s.hidden * (s.per_head_1 ? s.heads : 1) * element;
  const int64_t hidden = mlp ? s.blocks * s.heads * s.hidden : 0;
  if (!backward.has_value()) {
    return of_chunks + weight + of_parts * 4 + hidden * element + (mlp ? s.blocks * s.heads * s.result * 4 : 0);
  }
  const int64_t of_first = backward->first() ? of_parts * element + hidden * 4 : 0;
  const int64_t again = plan.gathers ? of_chunks + (mlp ? of_parts * 4 : 0) : 0;
  return weight + again + of_first + (backward->x ? of_chunks : 0) + (backward->w2 ? hidden * element : 0);
}

}  // namespace

CompressPlan plan_compress(const CompressSizes& sizes, ElementType type, const std::optional<PhiMask>& backward) {
  const int64_t element = type == ElementType::kFloat32 ? 4 : 2;
  CompressPlan plan{};
  plan.phi = sizes.phi;
  plan.why = kMean;
  if (plan.phi != Phi::kMean) {
    plan.first = sizes.per_head_1 ? Product::kPerHead : Product::kShared;
    plan.why = sizes.per_head_1 ? kPerHead : kShared;
  }
  if (plan.phi == Phi::kMlp) {
    plan.second = sizes.per_head_2 ? Product::kPerHead : Product::kShared;
  }
  plan.gathers = gathers_chunks(plan.phi, backward);
  plan.products = count_products(plan.phi, plan.gathers, backward);
  plan.workspace_bytes = workspace(sizes, plan, element, backward);
  add_launches(plan, sizes.packed, backward);
  return plan;
}

}  // namespace nsa
