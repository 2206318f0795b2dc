// Tensor-core products of 16-bit elements and the moves that feed them, for sm_80 and later: one thin function per
// instruction. Fragments are those of mma.m16n8k16: see the PTX ISA, "Matrix fragments for mma.m16n8k16".
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "common/threads.cuh"

namespace nsa {

using Half = __half;
using BFloat16 = __nv_bfloat16;

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// threadIdx.x, read anew: what is computed from it is not kept in registers across a loop that has none to spare.
__device__ inline int fresh_thread() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;\n" : "=r"(thread));
  return thread;
}

// blockIdx.x, in the same way.
__device__ inline int fresh_block() {
  int block;
  asm volatile("mov.u32 %0, %%ctaid.x;\n" : "=r"(block));
  return block;
}

// Copies 16 bytes to shared memory, or writes zeros there when `valid` is false.
__device__ inline void copy_async(void* shared, const void* global, bool valid) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
               : "memory");
}
// The same for a float32 number.
__device__ inline void copy_number(float* shared, const float* global, bool valid) {
  const int bytes = valid ? 4 : 0;
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;\n" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
               : "memory");
}
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
// Waits until at most `kPending` of the newest groups are under way.
template <int kPending>
__device__ inline void wait_copies() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

// Four 8 x 8 matrices; lane i gives the shared address of row i % 8 of matrix i / 8.
__device__ inline void load_matrices(uint32_t (&to)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address)
               : "memory");
}
__device__ inline void load_matrices_transposed(uint32_t (&to)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address)
               : "memory");
}

// An 8 x 8 matrix, of which a lane holds two numbers of row lane / 4, turned round.
__device__ inline uint32_t turn_matrix(uint32_t from) {
  uint32_t to;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;\n" : "=r"(to) : "r"(from));
  return to;
}

// c (16 x 8, float32) += a (16 x 16) b (16 x 8).
template <typename Element>
__device__ inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (sizeof(Element) == 2 && !__is_same(Element, Half)) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// Two float32 numbers rounded to 16 bits, the first in the low half.
template <typename Element>
__device__ inline uint32_t pack(float low, float high) {
  uint32_t bits;
  if constexpr (__is_same(Element, Half)) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;\n" : "=r"(bits) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(bits) : "f"(high), "f"(low));
  }
  return bits;
}

template <typename Element>
__device__ inline float to_float(Element x) {
  if constexpr (__is_same(Element, float)) {
    return x;
  } else if constexpr (__is_same(Element, Half)) {
    return __half2float(x);
  } else {
    return __bfloat162float(x);
  }
}

template <typename Element>
__device__ inline Element from_float(float x) {
  if constexpr (__is_same(Element, float)) {
    return x;
  } else if constexpr (__is_same(Element, Half)) {
    return __float2half_rn(x);
  } else {
    return __float2bfloat16_rn(x);
  }
}

// The float32 sums, rounded, of two times eight 16-bit elements.
template <typename Element>
__device__ inline uint4 add_chunks(uint4 x, uint4 y) {
  const Element* const left = reinterpret_cast<const Element*>(&x);
  const Element* const right = reinterpret_cast<const Element*>(&y);
  uint4 sum;
  uint32_t* const words = reinterpret_cast<uint32_t*>(&sum);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    words[i] = pack<Element>(to_float(left[2 * i]) + to_float(right[2 * i]),
                             to_float(left[2 * i + 1]) + to_float(right[2 * i + 1]));
  }
  return sum;
}

__device__ inline float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace nsa
