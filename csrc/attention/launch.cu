// Which instantiation runs; how rows are split in the backward; where packed compressed keys lie.
#include "attention/launch.h"
#include "attention/launch_keys_sm90.cuh"
#include "attention/launch_query_sm90.cuh"
#include "attention/launch_sm80.cuh"
#include "attention/launch_sm90.cuh"

namespace nsa {

// Compiled in instantiations/.
extern template void launch_range_forward_sm80<Half, 64, 64>(const RangeForwardParams&, cudaStream_t);
extern template void launch_range_forward_sm80<Half, 128, 128>(const RangeForwardParams&, cudaStream_t);
extern template void launch_range_forward_sm80<Half, 192, 128>(const RangeForwardParams&, cudaStream_t);
extern template void launch_range_forward_sm80<Half, 256, 256>(const RangeForwardParams&, cudaStream_t);
extern template void launch_range_forward_sm80<BFloat16, 64, 64>(const RangeForwardParams&, cudaStream_t);
extern template void launch_range_forward_sm80<BFloat16, 128, 128>(const RangeForwardParams&, cudaStream_t);
extern template void launch_range_forward_sm80<BFloat16, 192, 128>(const RangeForwardParams&, cudaStream_t);
extern template void launch_range_forward_sm80<BFloat16, 256, 256>(const RangeForwardParams&, cudaStream_t);
extern template void launch_range_backward_query_sm80<Half, 64, 64>(const RangeBackwardParams&, cudaStream_t);
extern template void launch_range_backward_keys_sm80<Half, 64, 64>(const RangeBackwardParams&, cudaStream_t);
extern template void launch_range_backward_query_sm80<Half, 128, 128>(const RangeBackwardParams&, cudaStream_t);
extern template void launch_range_backward_keys_sm80<Half, 128, 128>(const RangeBackwardParams&, cudaStream_t);
extern template void launch_range_backward_query_sm80<Half, 192, 128>(const RangeBackwardParams&, cudaStream_t);
extern template void launch_range_backward_keys_sm80<Half, 192, 128>(const RangeBackwardParams&, cudaStream_t);
extern template void launch_range_backward_query_sm80<Half, 256, 256>(const RangeBackwardParams&, cudaStream_t);
extern template void launch_range_backward_keys_sm80<Half, 256, 256>(const RangeBackwardParams&, cudaStream_t);
extern template void launch_range_backward_query_sm80<BFloat16, 64, 64>(const RangeBackwardParams&, cudaStream_t);
extern template void launch_range_backward_keys_sm80<BFloat16, 64, 64>(const RangeBackwardParams&, cudaStream_t);
extern template void launch_range_backward_query_sm80<BFloat16, 128, 128>(const RangeBackwardParams&, cudaStream_t);
extern template void launch_range_backward_keys_sm80<BFloat16, 128, 128>(const RangeBackwardParams&, cudaStream_t);
extern template void launch_range_backward_query_sm80<BFloat16, 192, 128>(const RangeBackwardParams&, cudaStream_t);
extern template void launch_range_backward_keys_sm80<BFloat16, 192, 128>(const RangeBackwardParams&, cudaStream_t);
extern template void launch_range_backward_query_sm80<BFloat16, 256, 256>(const RangeBackwardParams&, cudaStream_t);
extern template void launch_range_backward_keys_sm80<BFloat16, 256, 256>(const RangeBackwardParams&, cudaStream_t);
extern template bool try_range_forward_sm90<Half, 64, 64>(const RangeForwardParams&, cudaStream_t);
extern template bool try_range_forward_sm90<Half, 128, 128>(const RangeForwardParams&, cudaStream_t);
extern template bool try_range_forward_sm90<Half, 192, 128>(const RangeForwardParams&, cudaStream_t);
extern template bool try_range_forward_sm90<BFloat16, 64, 64>(const RangeForwardParams&, cudaStream_t);
extern template bool try_range_forward_sm90<BFloat16, 128, 128>(const RangeForwardParams&, cudaStream_t);
extern template bool try_range_forward_sm90<BFloat16, 192, 128>(const RangeForwardParams&, cudaStream_t);
extern template bool try_range_backward_query_sm90<Half, 64, 64>(const RangeBackwardParams&, cudaStream_t);
extern template bool try_range_backward_query_sm90<Half, 128, 128>(const RangeBackwardParams&, cudaStream_t);
extern template bool try_range_backward_query_sm90<Half, 192, 128>(const RangeBackwardParams&, cudaStream_t);
extern template bool try_range_backward_query_sm90<BFloat16, 64, 64>(const RangeBackwardParams&, cudaStream_t);
extern template bool try_range_backward_query_sm90<BFloat16, 128, 128>(const RangeBackwardParams&, cudaStream_t);
extern template bool try_range_backward_query_sm90<BFloat16, 192, 128>(const RangeBackwardParams&, cudaStream_t);
extern template bool range_backward_keys_runs_sm90<Half, 64, 64>(const RangeBackwardParams&);
extern template void launch_range_backward_keys_sm90<Half, 64, 64>(const RangeBackwardParams&, cudaStream_t);
extern template bool range_backward_keys_runs_sm90<Half, 128, 128>(const RangeBackwardParams&);
extern template void launch_range_backward_keys_sm90<Half, 128, 128>(const RangeBackwardParams&, cudaStream_t);
extern template bool range_backward_keys_runs_sm90<Half, 192, 128>(const RangeBackwardParams&);
extern template void launch_range_backward_keys_sm90<Half, 192, 128>(const RangeBackwardParams&, cudaStream_t);
extern template bool range_backward_keys_runs_sm90<BFloat16, 64, 64>(const RangeBackwardParams&);
extern template void launch_range_backward_keys_sm90<BFloat16, 64, 64>(const RangeBackwardParams&, cudaStream_t);
extern template bool range_backward_keys_runs_sm90<BFloat16, 128, 128>(const RangeBackwardParams&);
extern template void launch_range_backward_keys_sm90<BFloat16, 128, 128>(const RangeBackwardParams&, cudaStream_t);
extern template bool range_backward_keys_runs_sm90<BFloat16, 192, 128>(const RangeBackwardParams&);
extern template void launch_range_backward_keys_sm90<BFloat16, 192, 128>(const RangeBackwardParams&, cudaStream_t);

namespace {

__global__ void cumulative_blocks(const int32_t* cumulative_k, int32_t batch, int32_t block_size, int32_t block_stride,
                                  int32_t* cumulative) {
  int32_t sum = 0;
  for (int32_t b = 0; b < batch; ++b) {
    cumulative[b] = sum;
    sum += static_cast<int32_t>(num_compressed_blocks(cumulative_k[b + 1] - cumulative_k[b], block_size, block_stride));
  }
  cumulative[batch] = sum;
}

template <typename Element, int kDimK, int kDimV>
bool launch_range_forward_of(RangeForwardParams params, cudaStream_t stream) {
  if constexpr (kDimK <= 192) {
    if (params.sum.out != nullptr && try_range_forward_sm90<Element, kDimK, kDimV>(params, stream)) {
      return true;
    }
    params.sum = {};
    if (params.out.data == nullptr || try_range_forward_sm90<Element, kDimK, kDimV>(params, stream)) {
      return false;
    }
  }
  if (params.out.data != nullptr) {
    launch_range_forward_sm80<Element, kDimK, kDimV>(params, stream);
  }
  return false;
}

template <typename Element, int kDimK, int kDimV>
void launch_range_backward_query_of(const RangeBackwardParams& params, cudaStream_t stream) {
  if constexpr (kDimK <= 192) {
    if (try_range_backward_query_sm90<Element, kDimK, kDimV>(params, stream)) {
      return;
    }
  }
  launch_range_backward_query_sm80<Element, kDimK, kDimV>(params, stream);
}

template <typename Element, int kDimK, int kDimV>
bool keys_run_on_sm90(const RangeBackwardParams& params) {
  if constexpr (kDimK <= 192) {
    return range_backward_keys_runs_sm90<Element, kDimK, kDimV>(params);
  }
  return false;
}

template <typename Element, int kDimK, int kDimV>
void launch_range_backward_keys_of(const RangeBackwardParams& params, cudaStream_t stream) {
  if constexpr (kDimK <= 192) {
    if (keys_run_on_sm90<Element, kDimK, kDimV>(params)) {
      launch_range_backward_keys_sm90<Element, kDimK, kDimV>(params, stream);
      return;
    }
  }
  launch_range_backward_keys_sm80<Element, kDimK, kDimV>(params, stream);
}

// Into how many splits the sm_80 kernel's rows are cut.
RangeSplits choose_range_keys_splits_sm80(const RangeBackwardParams& params, int multiprocessors) {
  constexpr int64_t kWaves = 8;
  constexpr int64_t kBlocksPerMultiprocessor = 2;
  constexpr int64_t kLeastRows = 1024;  // fewer are not worth a partial sum
  const Sequences& s = params.sequences;
  const int64_t tiles = count_slots(s, params.num_keys, kKeysPerGradientTile) * s.heads_kv;
  const Visibility& seen = params.visibility;
  int64_t queries = s.length_q;
  if (seen.window != Visibility::kNoWindow) {
    queries = min_of(queries, int64_t{seen.window} + kKeysPerGradientTile);
  }
  const int64_t rows = queries * s.group;
  const int64_t wanted = ceil_div(kWaves * kBlocksPerMultiprocessor * multiprocessors, max_of(tiles, 1));
  const int64_t rows_per_split = max_of(ceil_div(ceil_div(rows, wanted), 64) * 64, kLeastRows);
  const int64_t splits = max_of(ceil_div(rows, rows_per_split), 1);
  return {static_cast<int32_t>(splits), static_cast<int32_t>(rows_per_split),
          splits > 1 ? tiles * splits * kKeysPerGradientTile * tile_row_size(params.q.width, params.v.width) : 0};
}

}  // namespace

bool launch_range_forward(const RangeForwardParams& params, ElementType type, cudaStream_t stream) {
  bool sums = false;
  with_tile_dims(params.q.width, params.v.width, [&](auto k, auto v) {
    sums = type == ElementType::kFloat16 ? launch_range_forward_of<Half, k, v>(params, stream)
                                         : launch_range_forward_of<BFloat16, k, v>(params, stream);
  });
  return sums;
}

void launch_range_backward(const RangeBackwardParams& params, ElementType type, cudaStream_t stream) {
  with_tile_dims(params.q.width, params.v.width, [&](auto k, auto v) {
    if (type == ElementType::kFloat16) {
      launch_range_backward_query_of<Half, k, v>(params, stream);
      launch_range_backward_keys_of<Half, k, v>(params, stream);
    } else {
      launch_range_backward_query_of<BFloat16, k, v>(params, stream);
      launch_range_backward_keys_of<BFloat16, k, v>(params, stream);
    }
  });
}

RangeSplits choose_range_splits(const RangeBackwardParams& params, ElementType type, int multiprocessors) {
  bool on_sm90 = false;
  with_tile_dims(params.q.width, params.v.width, [&](auto k, auto v) {
    on_sm90 =
        type == ElementType::kFloat16 ? keys_run_on_sm90<Half, k, v>(params) : keys_run_on_sm90<BFloat16, k, v>(params);
  });
  return on_sm90 ? choose_range_keys_splits_sm90(params, multiprocessors)
                 : choose_range_keys_splits_sm80(params, multiprocessors);
}

void launch_cumulative_blocks(const Sequences& sequences, int32_t block_size, int32_t block_stride, int32_t* cumulative,
                              cudaStream_t stream) {
  cumulative_blocks<<<1, 1, 0, stream>>>(sequences.cumulative_k, sequences.batch, block_size, block_stride, cumulative);
  check_cuda(cudaGetLastError(), "places of compressed keys");
}

}  // namespace nsa
