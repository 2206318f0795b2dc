// How blocks become tokens: which products, which kernels before and after them, and what workspace they take.
#pragma once

#include <optional>

#include "common/plan.h"

namespace nsa {

// What phi is, by the weights that there are.
enum class Phi {
  kMean,    // none
  kLinear,  // w1
  kMlp,     // w1 and w2
};

// How a product with a weight is made by cuBLAS.
enum class Product {
  kNone,
  kShared,   // one for all heads, which share the weight
  kPerHead,  // a batch of them, each with the weight of its head
};

// Which gradients are asked for: those of weights that are not there never are.
struct PhiMask {
  bool x, pe, w1, b1, w2, b2;

  // Of the first layer, and of what the second hands on to it.
  bool first() const { return x || pe || w1 || b1; }
};

struct CompressSizes {
  int64_t chunks;  // rows of chunks, of all sequences
  int64_t blocks;  // rows of blocks
  int64_t heads;
  int64_t width;   // D of x
  int64_t hidden;  // rows of w1
  int64_t result;  // D'
  int64_t block_size;
  int64_t block_stride;
  Phi phi;
  bool per_head_1;  // whether heads have a w1 of their own
  bool per_head_2;
  bool packed;
};

struct CompressPlan {
  Phi phi;
  Product first;     // with w1, cut into the l/d parts of a block
  Product second;    // with w2
  int32_t products;  // in all, but for the small one of pe
  bool gathers;      // whether chunks are read, and where there is a hidden layer made into it again
  int64_t workspace_bytes;
  const char* why;
  Launches launches;
};
// `backward`: the gradients of one; none: a forward.
CompressPlan plan_compress(const CompressSizes& sizes, ElementType type, const std::optional<PhiMask>& backward);

}  // namespace nsa
