// Hopper's asynchronous matrix products, of a warpgroup's 64 rows at once: one instruction each. See the PTX ISA,
// "Asynchronous warpgroup level matrix instructions".
//
// An instruction names each of its registers, so that every width has a function of its own. They differ in nothing but
// numbers: macros write them out.
#pragma once

#include "common/sm90/wgmma.cuh"

namespace nsa {

// The first operands of an instruction, the sums c[kTiles][4]: their names, and what they are bound to. `mode`: "=f" or
// "+f", whether they are written or added to.
#define NSA_NAMES_4 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define NSA_NAMES_6 NSA_NAMES_4 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define NSA_NAMES_8 NSA_NAMES_6 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define NSA_NAMES_10 NSA_NAMES_8 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define NSA_NAMES_12 NSA_NAMES_10 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define NSA_NAMES_16 NSA_NAMES_12 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define NSA_NAMES_24                                                                                            \
  NSA_NAMES_16                                                                                                  \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, " \
  "%85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define NSA_TILE(mode, c, i) mode(c[i][0]), mode(c[i][1]), mode(c[i][2]), mode(c[i][3])
#define NSA_TILE_PAIR(mode, c, i) NSA_TILE(mode, c, i), NSA_TILE(mode, c, i + 1)
#define NSA_TILES_4(mode, c) NSA_TILE_PAIR(mode, c, 0), NSA_TILE_PAIR(mode, c, 2)
#define NSA_TILES_6(mode, c) NSA_TILES_4(mode, c), NSA_TILE_PAIR(mode, c, 4)
#define NSA_TILES_8(mode, c) NSA_TILES_6(mode, c), NSA_TILE_PAIR(mode, c, 6)
#define NSA_TILES_10(mode, c) NSA_TILES_8(mode, c), NSA_TILE_PAIR(mode, c, 8)
#define NSA_TILES_12(mode, c) NSA_TILES_10(mode, c), NSA_TILE_PAIR(mode, c, 10)
#define NSA_TILES_16(mode, c) NSA_TILES_12(mode, c), NSA_TILE_PAIR(mode, c, 12), NSA_TILE_PAIR(mode, c, 14)
#define NSA_TILES_24(mode, c)                                                                                \
  NSA_TILES_16(mode, c), NSA_TILE_PAIR(mode, c, 16), NSA_TILE_PAIR(mode, c, 18), NSA_TILE_PAIR(mode, c, 20), \
      NSA_TILE_PAIR(mode, c, 22)

// An instruction of one step of 16 along k. The numbers are those of the operands after the sums: a, b, and so on.
#define NSA_INSTRUCTION(kTiles, kColumns, kTypes, predicate, operands)                          \
  "{\n.reg .pred add;\n" predicate "wgmma.mma_async.sync.aligned.m64n" #kColumns "k16%" #kTypes \
  " {" NSA_NAMES_##kTiles "}, " operands ";\n}\n"
#define NSA_LEFT(a) "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3])

// c (64 x N, as an Accumulator of each warp's 16 rows) = a b, or c += a b, both operands in shared memory: row i of a
// and column j of b are rows of their tiles.
#define NSA_MULTIPLY(kTiles, kColumns, kA, kB, kAdd, kTypes)                                        \
  template <typename Element>                                                                       \
  __device__ inline void multiply_async(float (&c)[kTiles][4], uint64_t a, uint64_t b, bool add) {  \
    asm volatile(NSA_INSTRUCTION(kTiles, kColumns, kTypes, "setp.ne.b32 add, %" #kAdd ", 0;\n",     \
                                 "%" #kA ", %" #kB ", add, 1, 1, 0, 0")                             \
                 : NSA_TILES_##kTiles("+f", c)                                                      \
                 : "l"(a), "l"(b), "r"(static_cast<int>(add)), "C"(MatrixTypes<Element>::kSuffix)); \
  }
NSA_MULTIPLY(4, 32, 16, 17, 18, 19)
NSA_MULTIPLY(6, 48, 24, 25, 26, 27)
NSA_MULTIPLY(8, 64, 32, 33, 34, 35)
NSA_MULTIPLY(10, 80, 40, 41, 42, 43)
NSA_MULTIPLY(12, 96, 48, 49, 50, 51)
NSA_MULTIPLY(16, 128, 64, 65, 66, 67)

// The same, c = a b: what c was does not matter.
#define NSA_MULTIPLY_FIRST(kTiles, kColumns, kA, kB, kTypes)                                                         \
  template <typename Element>                                                                                        \
  __device__ inline void multiply_first(float (&c)[kTiles][4], uint64_t a, uint64_t b) {                             \
    asm volatile(                                                                                                    \
        NSA_INSTRUCTION(kTiles, kColumns, kTypes, "setp.ne.b32 add, 0, 0;\n", "%" #kA ", %" #kB ", add, 1, 1, 0, 0") \
        : NSA_TILES_##kTiles("=f", c)                                                                                \
        : "l"(a), "l"(b), "C"(MatrixTypes<Element>::kSuffix)                                                         \
        : "memory");                                                                                                 \
  }
NSA_MULTIPLY_FIRST(4, 32, 16, 17, 18)
NSA_MULTIPLY_FIRST(6, 48, 24, 25, 26)
NSA_MULTIPLY_FIRST(8, 64, 32, 33, 34)

// c += a b, a in registers: lane i of warp w holds the fragment of mma.m16n8k16 of rows [16 w, 16 w + 16). Row k of b
// is row k of its tile.
#define NSA_MULTIPLY_LEFT(kTiles, kColumns, kA0, kA1, kA2, kA3, kB, kAdd, kTypes)                              \
  template <typename Element>                                                                                  \
  __device__ inline void multiply_async(float (&c)[kTiles][4], const uint32_t (&a)[4], uint64_t b, bool add) { \
    asm volatile(NSA_INSTRUCTION(kTiles, kColumns, kTypes, "setp.ne.b32 add, %" #kAdd ", 0;\n",                \
                                 "{%" #kA0 ", %" #kA1 ", %" #kA2 ", %" #kA3 "}, %" #kB ", add, 1, 1, 1")       \
                 : NSA_TILES_##kTiles("+f", c)                                                                 \
                 : NSA_LEFT(a), "l"(b), "r"(static_cast<int>(add)), "C"(MatrixTypes<Element>::kSuffix));       \
  }
NSA_MULTIPLY_LEFT(8, 64, 32, 33, 34, 35, 36, 37, 38)
NSA_MULTIPLY_LEFT(16, 128, 64, 65, 66, 67, 68, 69, 70)
NSA_MULTIPLY_LEFT(24, 192, 96, 97, 98, 99, 100, 101, 102)

// c = a b, whatever c was, and c += a b: a in registers as there, column j of b is row j of its tile.
#define NSA_MULTIPLY_ROWS(name, mode, predicate)                                                  \
  template <typename Element>                                                                     \
  __device__ inline void name(float (&c)[8][4], const uint32_t (&a)[4], uint64_t b) {             \
    asm volatile(NSA_INSTRUCTION(8, 64, 37, predicate, "{%32, %33, %34, %35}, %36, add, 1, 1, 0") \
                 : NSA_TILES_8(mode, c)                                                           \
                 : NSA_LEFT(a), "l"(b), "C"(MatrixTypes<Element>::kSuffix)                        \
                 : "memory");                                                                     \
  }
NSA_MULTIPLY_ROWS(multiply_rows_first, "=f", "setp.ne.b32 add, 0, 0;\n")
NSA_MULTIPLY_ROWS(multiply_rows, "+f", "setp.eq.b32 add, 0, 0;\n")

}  // namespace nsa
