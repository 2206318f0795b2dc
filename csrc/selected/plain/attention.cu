// The selected branch in float32 (common/plain/forward.cuh, common/plain/backward.cuh).
#include "common/plain/backward.cuh"
#include "common/plain/forward.cuh"
#include "selected/cuda/launch.h"

namespace nsa {
namespace {

struct ListedKeys {
  const int32_t* blocks;
  int32_t select_size;
  int32_t count;
  int64_t end;  // of the keys that the row may see

  __device__ int32_t at(int32_t i) const {
    const int64_t block = blocks[i / select_size];
    const int64_t key = block * select_size + i % select_size;
    return block >= 0 && key < end ? static_cast<int32_t>(key) : -1;
  }
};

struct ListedQueries {
  const int32_t* queries;
  int64_t first_number;  // of the sequence's first query, counted through the whole batch
  int64_t first_query;   // that stands at the key or after it
  int32_t count;

  __device__ int32_t at(int32_t i) const {
    const int64_t query = queries[i] - first_number;
    return query >= first_query ? static_cast<int32_t>(query) : -1;
  }
};

struct SelectedBranch {
  using Forward = SelectedForwardParams;
  using Backward = SelectedBackwardParams;

  template <typename Params>
  static __device__ KeysPlace keys_of(const Params&, const SequencePlace& place) {
    return {place.k_begin, place.k_length};
  }

  static __device__ const int32_t* key_starts(const Backward& params) { return params.sequences.cumulative_k; }

  template <typename Params>
  static __device__ ListedKeys keys_seen(const Params& params, const SequencePlace&, const KeysPlace& keys,
                                         int64_t number, int32_t head_kv, int32_t position) {
    const int64_t list = (number * params.sequences.heads_kv + head_kv) * params.num_selected;
    return {params.block_indices + list, params.select_size, params.num_selected * params.select_size,
            min_of(int64_t{position} + 1, keys.length)};
  }

  static __device__ ListedQueries queries_seeing(const Backward& params, const SequencePlace& place, int32_t sequence,
                                                 int32_t key, int32_t head_kv) {
    const SequenceLayout& s = params.sequences;
    const int64_t slots = params.chosen_by.blocks / s.heads_kv;
    const int64_t first_slot = s.packed() ? place.k_begin / params.select_size + sequence
                                          : sequence * ceil_div(s.length_k, params.select_size);
    const int64_t id = head_kv * slots + first_slot + key / params.select_size;
    const int32_t begin = params.chosen_by.begins[id];
    return {params.chosen_by.queries + begin, s.packed() ? place.q_begin : sequence * s.length_q,
            max_of(int64_t{key} - place.offset, 0), params.chosen_by.begins[id + 1] - begin};
  }
};

}  // namespace

void launch_selected_forward_plain(const SelectedForwardParams& params, cudaStream_t stream) {
  plain::launch_forward<SelectedBranch>(params, stream, "attention over listed blocks, float32");
}

void launch_selected_backward_plain(const SelectedBackwardParams& params, NeededGradients needed, cudaStream_t stream) {
  plain::launch_backward<SelectedBranch>(params, params.sequences.length_k, needed, stream,
                                         "attention over listed blocks, float32, backward");
}

}  // namespace nsa
