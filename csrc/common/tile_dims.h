// What every tensor-core kernel is compiled for, as the first base of its Shape: an element of 16 bits, and the columns
// of its tiles of keys (and queries) and of values (and outputs).
#pragma once

namespace nsa {

template <typename Element_, int kDimK_, int kDimV_>
struct TileDimsOf {
  using Element = Element_;
  static constexpr int kDimK = kDimK_;
  static constexpr int kDimV = kDimV_;
};

}  // namespace nsa
