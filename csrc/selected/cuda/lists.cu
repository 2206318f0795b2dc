// Turns the lists of blocks round: which queries chose each block. A stable sort by block, the beginnings of its runs,
// and how they are cut: into segments, or into pieces.
#include <cub/block/block_scan.cuh>
#include <cub/device/device_radix_sort.cuh>

#include "common/launch.cuh"
#include "common/sequences.cuh"
#include "selected/cuda/launch.h"

namespace nsa {
namespace {

using list_tiles::kKinds;
using list_tiles::kScanThreads;
using list_tiles::kThreads;

__device__ inline bool readable_block(const InvertListsParams& params, const SequencePlace& place, const Tile& at,
                                      int64_t block) {
  const int64_t first_key = block * params.select_size;
  return at.index < place.q_length && block >= 0 && first_key <= place.offset + at.index && first_key < place.k_length;
}

// Entry i of all lists as (block, query). What no query may read, such as -1, gets the block after the last, and so
// does what rows after the last sequence list.
__global__ void list_pairs(const __grid_constant__ InvertListsParams params) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= params.pairs) {
    return;
  }
  const SequenceLayout& s = params.sequences;
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

// The first entry of the sorted lists that `before` is not true of; all entries before it are.
template <typename Before>
__device__ inline int32_t first_not(int64_t entries, const Before& before) {
  int64_t low = 0;
  int64_t high = entries;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (before(middle)) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return static_cast<int32_t>(low);
}

__global__ void find_begins(const __grid_constant__ InvertListsParams params) {
  const int64_t id = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (id > params.blocks) {
    return;
  }
  params.begins[id] = first_not(params.pairs, [&](int64_t i) { return params.sorted_keys[i] < id; });
}

// One block of threads walks all blocks: running sums of their segments, and of those of blocks that have several.
__global__ void __launch_bounds__(kScanThreads) count_segments(const __grid_constant__ InvertListsParams params) {
  using Scan = cub::BlockScan<int32_t, kScanThreads>;
  static_assert(sizeof(typename Scan::TempStorage) <= list_tiles::kScanBytes);
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

// Where the queries of each chunk begin in each block's.
__global__ void find_edges(const __grid_constant__ InvertListsParams params) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= (params.pieces.chunks + 1) * params.blocks) {
    return;
  }
  const int64_t id = i % params.blocks;
  const int64_t least = i / params.blocks * params.pieces.chunk * (params.ranked ? params.num_selected : 1);
  params.edges[i] = first_not(params.pairs, [&](int64_t at) {
    const int32_t key = params.sorted_keys[at];
    const int32_t query = params.queries[at];
    return key < id || (key == id && query < least);
  });
}

__device__ inline int32_t most_of_chunk(const KeyPieces& pieces, int32_t chunk) {
  return chunk == pieces.chunks - 1 ? pieces.most_queries_at_last : pieces.most_queries;
}

__device__ inline int32_t pieces_of(const KeyPieces& pieces, int32_t queries, int32_t chunk) {
  const auto most = static_cast<uint32_t>(most_of_chunk(pieces, chunk));
  return static_cast<int32_t>((static_cast<uint32_t>(queries) + most - 1) / most);
}

// Of each block, how many pieces come before those of each chunk.
__global__ void count_pieces(const __grid_constant__ InvertListsParams params) {
  const int64_t id = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (id >= params.blocks) {
    return;
  }
  int32_t before = 0;
  int32_t at = params.edges[id];
  for (int32_t chunk = 0; chunk < params.pieces.chunks; ++chunk) {
    const int32_t next = params.edges[(chunk + 1) * params.blocks + id];
    params.pieces_before[chunk * params.blocks + id] = before;
    before += pieces_of(params.pieces, next - at, chunk);
    at = next;
  }
}

// A block's queries of one chunk.
struct PiecesOfChunk {
  int32_t first;
  int32_t queries;
  int32_t pieces;
  int32_t before;  // pieces of earlier chunks
  bool last;       // no later chunk has any
  Tile tile;       // set where there are pieces
};

__device__ inline PiecesOfChunk pieces_of_chunk(const InvertListsParams& params, int64_t id, int32_t chunk) {
  const KeyPieces& pieces = params.pieces;
  const SequenceLayout& s = params.sequences;
  PiecesOfChunk result{};
  const int32_t begin = params.edges[id];
  const int32_t end = params.edges[pieces.chunks * params.blocks + id];
  const int32_t next = params.edges[(chunk + 1) * params.blocks + id];
  result.first = params.edges[chunk * params.blocks + id];
  result.queries = next - result.first;
  result.last = next == end;
  result.before = params.pieces_before[chunk * params.blocks + id];
  result.pieces = pieces_of(pieces, result.queries, chunk);
  const bool nobodys = begin == end && chunk == pieces.chunks - 1;  // gradients of 0
  if (result.pieces > 0 || nobodys) {
    const int64_t slots = params.blocks / s.heads_kv;
    result.tile = find_tile(s, s.cumulative_k, 1, s.length_k, params.select_size, id % slots);
    const int64_t first_key = int64_t{result.tile.index} * params.select_size;
    result.pieces = first_key >= place_of(s, result.tile.sequence).k_length ? 0 : nobodys ? 1 : result.pieces;
  }
  return result;
}

// Where the pieces of a chunk go, in the order of work. Those that share their block with others, `several` of them,
// are added one after the other: they are spread over the first half, so that few wait. Between them come the others,
// the longest first, so that those that begin together end at about the same time.
struct OrderOfPieces {
  int32_t several;
  int32_t apart;

  __device__ OrderOfPieces(int32_t several_, int32_t all)
      : several(several_), apart(several_ > 0 ? max(all / 2 / several_, 1) : 1) {}
  // `rank` counts those that share their block first.
  __device__ int32_t operator()(int32_t rank) const {
    const int32_t of_others = rank - several;
    if (of_others < 0) {
      return rank * apart;
    }
    return of_others < several * (apart - 1) ? of_others + of_others / (apart - 1) + 1 : rank;
  }
};

// Kinds of pieces, in the order of their ranks: first those that share their block, by their number in it, then the
// others, by their length.
__device__ inline int kind_of(const PiecesOfChunk& of, int32_t i, int32_t most) {
  return of.pieces > 1 ? static_cast<int>(int64_t{i} * kKinds / of.pieces)
                       : kKinds + static_cast<int>(int64_t{most - of.queries} * kKinds / (most + 1));
}

// Piece i of a block's.
__device__ inline KeyPiece piece_of(const PiecesOfChunk& of, int32_t i, int64_t id, int32_t head) {
  const auto begin = static_cast<int32_t>(int64_t{of.queries} * i / of.pieces);
  const auto end = static_cast<int32_t>(int64_t{of.queries} * (i + 1) / of.pieces);
  return {.id = static_cast<int32_t>(id),
          .sequence = of.tile.sequence,
          .block = of.tile.index,
          .head_kv = head,
          .first = of.first + begin,
          .queries = end - begin,
          .number = of.before + i,
          .last = of.last && i == of.pieces - 1 ? 1 : 0};
}

// A block of threads for each KV head and chunk. Among pieces of about the same length the order is any.
__global__ void __launch_bounds__(kScanThreads) list_pieces(const __grid_constant__ InvertListsParams params) {
  static_assert(2 * kKinds <= kScanThreads);
  using Scan = cub::BlockScan<int32_t, kScanThreads>;
  __shared__ typename Scan::TempStorage storage;
  __shared__ int32_t earlier;  // pieces of earlier chunks
  __shared__ int32_t several;  // pieces that share their block
  // How many there are of each kind, first those that share their block; then the rank of the next one.
  __shared__ int32_t next[2 * kKinds];
  const KeyPieces& pieces = params.pieces;
  const int32_t chunk = static_cast<int32_t>(blockIdx.x) % pieces.chunks;
  const int32_t head = static_cast<int32_t>(blockIdx.x) / pieces.chunks;
  const int32_t most = most_of_chunk(pieces, chunk);
  const int64_t slots = params.blocks / params.sequences.heads_kv;
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < 2 * kKinds) {
    next[thread] = 0;
  }
  if (thread == 0) {
    earlier = 0;
  }
  __syncthreads();
  for (int64_t slot = thread; slot < slots; slot += kScanThreads) {
    const PiecesOfChunk of = pieces_of_chunk(params, head * slots + slot, chunk);
    if (of.before > 0) {
      atomicAdd(&earlier, of.before);
    }
    for (int32_t i = 0; i < of.pieces; ++i) {
      atomicAdd(&next[kind_of(of, i, most)], 1);
    }
  }
  __syncthreads();
  int32_t rank = 0;
  int32_t all = 0;
  Scan(storage).ExclusiveSum(thread < 2 * kKinds ? next[thread] : 0, rank, all);
  if (thread < 2 * kKinds) {
    next[thread] = rank;
  }
  if (thread == kKinds) {
    several = rank;
  }
  if (thread == 0 && chunk == pieces.chunks - 1) {
    pieces.counts[head] = earlier + all;
  }
  __syncthreads();
  const OrderOfPieces order(several, all);
  KeyPiece* const to = pieces.pieces + head * pieces.most_pieces + earlier;
  for (int64_t slot = thread; slot < slots; slot += kScanThreads) {
    const PiecesOfChunk of = pieces_of_chunk(params, head * slots + slot, chunk);
    for (int32_t i = 0; i < of.pieces; ++i) {
      to[order(atomicAdd(&next[kind_of(of, i, most)], 1))] = piece_of(of, i, head * slots + slot, head);
    }
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
  if (params.segments != nullptr) {
    launch(find_begins, ceil_div(params.blocks + 1, kThreads), kThreads, 0, stream, "beginnings of block lists",
           params);
    launch(count_segments, 1, kScanThreads, 0, stream, "segments of block lists", params);
  }
  if (params.pieces.pieces != nullptr) {
    launch(find_edges, ceil_div((params.pieces.chunks + 1) * params.blocks, kThreads), kThreads, 0, stream,
           "chunks of block lists", params);
    launch(count_pieces, ceil_div(params.blocks, kThreads), kThreads, 0, stream, "pieces of block lists", params);
    launch(list_pieces, int64_t{params.pieces.chunks} * params.sequences.heads_kv, kScanThreads, 0, stream,
           "pieces of block lists", params);
  }
}

}  // namespace nsa
