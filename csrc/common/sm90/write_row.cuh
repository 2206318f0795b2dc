// How rows of an accumulator leave for device memory from registers.
#pragma once

#include "common/sm80/mma.cuh"

namespace nsa {

// Adds eight elements to those at `to`, each sum rounded, as add_chunks does, but in the L2 cache.
template <typename Element>
__device__ inline void add_to_memory(Element* to, const uint32_t (&words)[4]) {
  if constexpr (__is_same(Element, Half)) {
    asm volatile("red.relaxed.gpu.global.add.noftz.v4.f16x2 [%0], {%1, %2, %3, %4};\n" ::"l"(to), "r"(words[0]),
                 "r"(words[1]), "r"(words[2]), "r"(words[3])
                 : "memory");
  } else {
    asm volatile("red.relaxed.gpu.global.add.noftz.v4.bf16x2 [%0], {%1, %2, %3, %4};\n" ::"l"(to), "r"(words[0]),
                 "r"(words[1]), "r"(words[2]), "r"(words[3])
                 : "memory");
  }
}

// Writes one of the lane's two rows of an accumulator, times `factor`, or adds it to what is there: the four lanes of a
// row trade their pairs of columns for chunks of 16 bytes. `to` may be null: then nothing is written.
template <typename Element, int kTiles>
__device__ inline void write_row(Element* to, int32_t width, const float (&c)[kTiles][4], int half, float factor,
                                 bool add, int lane) {
#pragma unroll
  for (int i = 0; i < kTiles; i += 4) {
    uint32_t words[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      words[j] = pack<Element>(c[i + j][2 * half] * factor, c[i + j][2 * half + 1] * factor);
    }
#pragma unroll
    for (int bit = 1; bit <= 2; bit *= 2) {
      const bool upper = (lane & bit) != 0;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if ((j & bit) == 0) {
          const uint32_t got = __shfl_xor_sync(0xffffffffu, upper ? words[j] : words[j | bit], bit);
          (upper ? words[j] : words[j | bit]) = got;
        }
      }
    }
    const int column = 8 * (i + lane % 4);
    if (to != nullptr && column < width) {
      if (add) {
        add_to_memory(to + column, words);
      } else {
        *reinterpret_cast<uint4*>(to + column) = make_uint4(words[0], words[1], words[2], words[3]);
      }
    }
  }
}

}  // namespace nsa
