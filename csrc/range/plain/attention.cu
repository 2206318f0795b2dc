// The compressed and the window branch in float32 (common/plain/forward.cuh, common/plain/backward.cuh).
#include "common/plain/backward.cuh"
#include "common/plain/forward.cuh"
#include "range/cuda/launch.h"

namespace nsa {
namespace {

// Of keys or of queries.
struct Range {
  int32_t begin;
  int32_t count;

  __device__ int32_t at(int32_t i) const { return begin + i; }
};

struct RangeBranch {
  using Forward = RangeForwardParams;
  using Backward = RangeBackwardParams;

  template <typename Params>
  static __device__ KeysPlace keys_of(const Params& params, const SequencePlace& place) {
    return nsa::keys_of(place, params.visibility, params.compressed);
  }

  static __device__ const int32_t* key_starts(const Backward& params) {
    return params.compressed ? params.sequences.cumulative_cmp : params.sequences.cumulative_k;
  }

  template <typename Params>
  static __device__ Range keys_seen(const Params& params, const SequencePlace&, const KeysPlace& keys, int64_t, int32_t,
                                    int32_t position) {
    const int32_t begin = params.visibility.begin(position);
    return {begin, max(min(params.visibility.end(position), keys.length) - begin, 0)};
  }

  static __device__ Range queries_seeing(const Backward& params, const SequencePlace& place, int32_t, int32_t key,
                                         int32_t) {
    const int64_t first = max_of(int64_t{params.visibility.first_position(key)} - place.offset, 0);
    const int64_t end = min_of(int64_t{params.visibility.last_position(key)} - place.offset + 1, place.q_length);
    return {static_cast<int32_t>(first), static_cast<int32_t>(max_of(end - first, 0))};
  }
};

}  // namespace

void launch_range_forward_plain(const RangeForwardParams& params, cudaStream_t stream) {
  plain::launch_forward<RangeBranch>(params, stream, "attention over a range of keys, float32");
}

void launch_range_backward_plain(const RangeBackwardParams& params, NeededGradients needed, cudaStream_t stream) {
  plain::launch_backward<RangeBranch>(params, params.num_keys, needed, stream,
                                      "attention over a range of keys, float32, backward");
}

}  // namespace nsa
