// Turns the lists of blocks round: which queries chose each block. A stable sort by block, and the beginnings of its
// runs.
#include <cub/block/block_scan.cuh>
#include <cub/device/device_radix_sort.cuh>

#include "common/launch.cuh"
#include "common/sequences.cuh"
#include "selected/launch.h"

namespace nsa {
namespace {

constexpr int kThreads = 256;
constexpr int kScanThreads = 1024;

__device__ inline bool readable_block(const InvertListsParams& params, const SequencePlace& place, const Tile& at,
                                      int64_t block) {
  const int64_t first_key = block * params.select_size;
  return block >= 0 && first_key <= place.offset + at.index && first_key < place.k_length;
}

// Entry i of all lists as (block, query). What no query may read, such as -1, gets the block after the last.
__global__ void list_pairs(const __grid_constant__ InvertListsParams params) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= params.pairs) {
    return;
  }
  const Sequences& s = params.sequences;
  const int64_t list = i / params.num_selected;
  const int64_t token = list / s.heads_kv;
  const int64_t head_kv = list % s.heads_kv;
  const Tile at = find_query(s, token);
  const SequencePlace place = place_of(s, at.sequence);
  const int64_t block = params.block_indices[i];
  int64_t id = params.blocks;
  if (readable_block(params, place, at, block)) {
    const int64_t before = s.packed() ? place.k_begin / params.select_size + at.sequence
                                      : at.sequence * ceil_div(s.length_k, params.select_size);
    id = head_kv * (params.blocks / s.heads_kv) + before + block;
  }
  params.keys[i] = static_cast<int32_t>(id);
  int64_t value = token;
  if (params.ranked) {
    int32_t rank = 0;  // in ascending order, whatever that of the list is
    for (int64_t j = list * params.num_selected; j < (list + 1) * params.num_selected; ++j) {
      const int64_t other = params.block_indices[j];
      rank += other >= 0 && (other < block || (other == block && j < i)) ? 1 : 0;
    }
    value = token * params.num_selected + rank;
  }
  params.values[i] = static_cast<int32_t>(value);
}

__global__ void find_begins(const __grid_constant__ InvertListsParams params) {
  const int64_t id = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (id > params.blocks) {
    return;
  }
  int64_t low = 0;
  int64_t high = params.pairs;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (params.sorted_keys[middle] < id) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  params.begins[id] = static_cast<int32_t>(low);
}

// One block of threads walks all blocks: running sums of their segments, and of those of blocks that have several.
__global__ void __launch_bounds__(kScanThreads) count_segments(const __grid_constant__ InvertListsParams params) {
  using Scan = cub::BlockScan<int32_t, kScanThreads>;
  __shared__ typename Scan::TempStorage segments_storage;
  __shared__ typename Scan::TempStorage partials_storage;
  int32_t segments_before = 0;
  int32_t partials_before = 0;
  for (int64_t first = 0; first < params.blocks; first += kScanThreads) {
    const int64_t id = first + threadIdx.x;
    int32_t segments = 0;
    if (id < params.blocks) {
      const int64_t queries = params.begins[id + 1] - params.begins[id];
      segments = static_cast<int32_t>(max_of(ceil_div(queries, params.segment), 1));
    }
    const int32_t partials = segments > 1 ? segments : 0;
    int32_t segments_sum = 0;
    int32_t partials_sum = 0;
    int32_t all_segments = 0;
    int32_t all_partials = 0;
    Scan(segments_storage).ExclusiveSum(segments, segments_sum, all_segments);
    Scan(partials_storage).ExclusiveSum(partials, partials_sum, all_partials);
    if (id < params.blocks) {
      params.segments[id] = segments_before + segments_sum;
      params.partials[id] = partials_before + partials_sum;
    }
    segments_before += all_segments;
    partials_before += all_partials;
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    params.segments[params.blocks] = segments_before;
    params.partials[params.blocks] = partials_before;
  }
}

int bits_of(int64_t blocks) {
  int bits = 1;
  while ((int64_t{1} << bits) <= blocks) {
    ++bits;
  }
  return bits;
}

cudaError_t sort(void* temporary, size_t& bytes, const InvertListsParams& params, cudaStream_t stream) {
  return cub::DeviceRadixSort::SortPairs(temporary, bytes, params.keys, params.sorted_keys, params.values,
                                         params.queries, params.pairs, 0, bits_of(params.blocks), stream);
}

}  // namespace

int64_t invert_lists_temporary_bytes(int64_t pairs, int64_t blocks) {
  InvertListsParams params{};
  params.pairs = pairs;
  params.blocks = blocks;
  size_t bytes = 0;
  check_cuda(sort(nullptr, bytes, params, nullptr), "sorting of block lists");
  return static_cast<int64_t>(bytes);
}

void launch_invert_lists(const InvertListsParams& params, cudaStream_t stream) {
  launch(list_pairs, ceil_div(params.pairs, kThreads), kThreads, 0, stream, "pairs of blocks and queries", params);
  if (params.pairs > 0) {
    size_t bytes = static_cast<size_t>(params.temporary_bytes);
    check_cuda(sort(params.temporary, bytes, params, stream), "sorting of block lists");
  }
  launch(find_begins, ceil_div(params.blocks + 1, kThreads), kThreads, 0, stream, "beginnings of block lists", params);
  launch(count_segments, 1, kScanThreads, 0, stream, "segments of block lists", params);
}

}  // namespace nsa
