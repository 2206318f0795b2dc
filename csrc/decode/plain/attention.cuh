// A decoding step without tensor cores, for any element: a block of threads has up to 16 rows of a unit and some keys,
// whose scores it keeps in shared memory. A warp computes the scores of a key, a thread sums up a column.
#pragma once

#include "decode/chain.cuh"
#include "decode/parts.cuh"

namespace nsa {

// Keys up to the end of a step of the warps; those beyond the last one are scored -inf.
__device__ inline int32_t padded_keys(int32_t keys) {
  return (keys + decode_plain::kKeys - 1) / decode_plain::kKeys * decode_plain::kKeys;
}

template <typename Element_>
struct PlainDecode {
  using Element = Element_;
  static constexpr int kThreads = decode_plain::kThreads;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kRows = decode_plain::kRows;

  float* q;             // (kRows, width)
  float* kept;          // (kRows, pitch)
  RowOffsets* offsets;  // of every key
  int32_t pitch;
  int32_t count;

  __device__ PlainDecode(unsigned char* shared, int32_t width, int32_t room)
      : q(nullptr), kept(nullptr), offsets(reinterpret_cast<RowOffsets*>(shared)), pitch(0), count(0) {
    q = reinterpret_cast<float*>(offsets + padded_keys(room));
    kept = q + kRows * width;
    pitch = decode_tiles::kept_pitch(room, decode_plain::kKeys);
  }

  __device__ void read_queries(const DecodeParams& params, const DecodeSequence& sequence, int32_t head_kv,
                               int32_t first_row, int32_t rows) const {
    const int32_t width = params.q.width;
#pragma unroll 1
    for (int32_t i = static_cast<int32_t>(threadIdx.x); i < rows * width; i += kThreads) {
      const int32_t row = first_row + i / width;
      const int32_t query = static_cast<int32_t>(params.by_group.divide(static_cast<uint32_t>(row)));
      q[i] = to_float(params.q.row<Element>(sequence.batch, sequence.first + query,
                                            head_kv * params.group + row - query * params.group)[i % width]);
    }
  }

  // Scores in units of log2(e); those that `seen(row)` leaves out are -inf.
  template <typename Seen>
  __device__ void score(const DecodeParams& params, const PagedRows& keys, int32_t head, int32_t rows,
                        const Seen& seen) const {
    const Element* const base = static_cast<const Element*>(keys.k.data) + head * keys.k.head_stride;
    const int32_t width = params.q.width;
#pragma unroll 1
    for (int32_t i = this_warp(); i < count; i += kWarps) {
      const int64_t at = offsets[i].k;
#pragma unroll 1
      for (int32_t row = 0; row < rows; ++row) {
        float sum = 0.f;
        for (int32_t c = this_lane(); c < width && at >= 0; c += 32) {
          sum = fmaf(q[row * width + c], to_float(base[at + c]), sum);
        }
#pragma unroll
        for (int step = 16; step > 0; step /= 2) {
          sum += __shfl_xor_sync(0xffffffffu, sum, step);
        }
        if (this_lane() == 0) {
          const KeyRange range = seen(row);
          kept[row * pitch + i] = i >= range.begin && i < range.end ? sum * params.scale_log2 : kMinusInfinity;
        }
      }
    }
  }

  // Each row's highest score and the sum of the exponentials. A warp for each row.
  __device__ void sum_rows(RowSums* sums, int32_t rows) const {
#pragma unroll 1
    for (int32_t row = this_warp(); row < rows; row += kWarps) {
      float highest = kMinusInfinity;
      for (int32_t i = this_lane(); i < count; i += 32) {
        highest = fmaxf(highest, kept[row * pitch + i]);
      }
#pragma unroll
      for (int step = 16; step > 0; step /= 2) {
        highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, step));
      }
      float total = 0.f;
      for (int32_t i = this_lane(); i < count && highest != kMinusInfinity; i += 32) {
        total += exp2f(kept[row * pitch + i] - highest);
      }
#pragma unroll
      for (int step = 16; step > 0; step /= 2) {
        total += __shfl_xor_sync(0xffffffffu, total, step);
      }
      if (this_lane() == 0) {
        sums[row] = {highest, total};
      }
    }
  }

  // out (rows, columns) += exponentials times values. A thread for each column.
  __device__ void sum_values(const DecodeParams& params, const PagedRows& keys, int32_t head, const RowSums* sums,
                             int32_t rows, float* out) const {
    const Element* const base = static_cast<const Element*>(keys.v.data) + head * keys.v.head_stride;
#pragma unroll 1
    for (int32_t c = static_cast<int32_t>(threadIdx.x); c < params.columns; c += kThreads) {
      float total[kRows] = {};
#pragma unroll 1
      for (int32_t i = 0; i < count; ++i) {
        const int64_t at = offsets[i].v;
        const float value = at >= 0 && c < params.out.width ? to_float(base[at + c]) : 0.f;
#pragma unroll
        for (int row = 0; row < kRows; ++row) {
          if (row < rows && sums[row].highest != kMinusInfinity) {
            total[row] = fmaf(exp2f(kept[row * pitch + i] - sums[row].highest), value, total[row]);
          }
        }
      }
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        if (row < rows) {
          out[row * params.columns + c] = total[row];
        }
      }
    }
  }
};

// Blocks of threads (split, unit, tile of rows).
template <typename Element>
__global__ void __launch_bounds__(decode_plain::kThreads)
    decode_ranges_plain(const __grid_constant__ DecodeParams params) {
  using Plain = PlainDecode<Element>;
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ RowSums sums[Plain::kRows];
  wait_for_previous();
  start_next();
  const RangeSplit split(params, static_cast<int32_t>(blockIdx.x), static_cast<int32_t>(blockIdx.y),
                         static_cast<int32_t>(blockIdx.z) * Plain::kRows, Plain::kRows);
  if (!begin_split(params, split)) {
    return;
  }
  Plain plain(shared, params.q.width, max(params.split_keys(), params.window_split_keys));
  plain.count = padded_keys(split.count);
  const PagedRows& keys = split.keys(params);
  plain.read_queries(params, split.sequence, split.unit.head, split.first_row, split.here);
#pragma unroll 1
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < plain.count; i += Plain::kThreads) {
    plain.offsets[i] = i < split.count ? locate_row(params, keys, split.unit.index, split.shift + i) : nowhere();
  }
  __syncthreads();
  plain.score(params, keys, split.unit.head, split.here,
              [&](int32_t row) { return split.seen(params, split.first_row + row); });
  __syncthreads();
  plain.sum_rows(sums, split.here);
  __syncthreads();
  const int64_t place = split.place(params);
  plain.sum_values(params, keys, split.unit.head, sums, split.here, params.range_out + place * params.columns);
#pragma unroll 1
  for (int32_t row = static_cast<int32_t>(threadIdx.x); row < split.here; row += Plain::kThreads) {
    params.range_sums[place + row] = sums[row];
  }
  __syncthreads();
  if (split.compressed) {
    weigh_split(params, split, plain.kept, plain.pitch, plain.count, [&](int32_t row) { return sums[row].highest; });
  }
}

// Blocks of threads (part, unit, query and tile of heads).
template <typename Element>
__global__ void __launch_bounds__(decode_plain::kThreads)
    decode_selected_plain(const __grid_constant__ DecodeParams params) {
  using Plain = PlainDecode<Element>;
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ RowSums sums[Plain::kRows];
  __shared__ PartList list;
  __shared__ bool last;
  const int32_t tiles = (params.group + Plain::kRows - 1) / Plain::kRows;
  const SelectedPart part(params, static_cast<int32_t>(blockIdx.x), static_cast<int32_t>(blockIdx.y),
                          static_cast<int32_t>(blockIdx.z), Plain::kRows, tiles);
  start_next();
  if (part.query >= part.sequence.queries) {
    return;
  }
  wait_for_previous();
  Plain plain(shared, params.q.width, params.part_blocks * params.select_size);
  part.read_list(params, list);
  plain.read_queries(params, part.sequence, part.unit.head, part.query * params.group + part.first_head, part.heads);
  __syncthreads();
  const int32_t seen = part.count_keys(params, list);
  plain.count = padded_keys(seen);
#pragma unroll 1
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < plain.count; i += Plain::kThreads) {
    plain.offsets[i] = i < seen ? part.locate(params, list, i) : nowhere();
  }
  __syncthreads();
  plain.score(params, params.selected, part.unit.head, part.heads, [&](int32_t) { return KeyRange{0, seen}; });
  __syncthreads();
  plain.sum_rows(sums, part.heads);
  __syncthreads();
  const int64_t place = part.sums_place(params);
  plain.sum_values(params, params.selected, part.unit.head, sums, part.heads, params.part_out + place * params.columns);
#pragma unroll 1
  for (int32_t row = static_cast<int32_t>(threadIdx.x); row < part.heads; row += Plain::kThreads) {
    params.part_sums[place + row] = sums[row];
  }
  finish_part<Element>(params, part, tiles, last);
}

}  // namespace nsa
