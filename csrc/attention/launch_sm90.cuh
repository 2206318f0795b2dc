// Launches of the kernels for Hopper, which calls they take, and the tile sizes they run with.
#pragma once

#include "attention/forward_sm90.cuh"
#include "common/launch_sm90.cuh"

namespace nsa {

// Rows of a warpgroup that whole queries fill.
constexpr int32_t consumer_rows(int32_t group) { return 64 / group * group; }

// Whether these tensors suit the kernel; others run on the sm_80 kernel. A group that leaves a quarter of the rows
// empty is not worth it.
inline bool range_forward_fits_sm90(const RangeForwardParams& params) {
  const Sequences& s = params.sequences;
  const int64_t batch = s.packed() ? 1 : s.batch;
  return consumer_rows(s.group) >= 48 && params.scale > 0.f && params.q.width <= 192 && params.v.width <= 128 &&
         params.num_keys > 0 && copies_by_map(params.q, batch, s.length_q, int64_t{s.heads_kv} * s.group) &&
         copies_by_map(params.k, batch, params.num_keys, s.heads_kv) &&
         copies_by_map(params.v, batch, params.num_keys, s.heads_kv);
}

template <typename Shape>
void launch_range_forward_shape(const RangeForwardParams& range, cudaStream_t stream) {
  constexpr const char* kName = "attention over a range";
  constexpr ElementType kType = kElementType<typename Shape::Element>;
  const Sequences& s = range.sequences;
  const int32_t rows = consumer_rows(s.group);
  const int64_t tiles = count_slots(s, s.length_q * s.group, int64_t{Shape::kConsumers} * rows) * s.heads_kv;
  if (tiles > 0x3fffffff) {
    throw std::runtime_error("nsa_torch: attention over a range: too many tiles for one launch");
  }
  const int64_t batch = s.packed() ? 1 : s.batch;
  const auto group = static_cast<uint32_t>(s.group);
  RangeForwardSm90Params params{
      .range = range,
      .tiles = static_cast<int32_t>(tiles),
      .consumer_rows = rows,
      .consumer_bytes = rows * Shape::kDimK * static_cast<int32_t>(sizeof(typename Shape::Element)),
      .q = tensor_map(range.q, kType, batch, s.length_q, s.heads_kv * s.group, group, 64 / group, kName),
      .k = tensor_map(range.k, kType, batch, range.num_keys, s.heads_kv, 1, Shape::kKeys, kName),
      .v = tensor_map(range.v, kType, batch, range.num_keys, s.heads_kv, 1, Shape::kKeys, kName)};
  int device = 0;
  int multiprocessors = 0;
  check_cuda(cudaGetDevice(&device), kName);
  check_cuda(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), kName);
  launch(range_forward_sm90<Shape>, min_of(tiles, multiprocessors), Shape::kThreads, sizeof(typename Shape::Shared),
         stream, kName, params);
}

// Two warpgroups with many keys a step where rows see many keys; three with fewer, whose tiles' begins and ends overlap
// better, where they see few.
template <typename Element, int kDimK, int kDimV>
using LongForwardSm90Shape = RangeForwardSm90Shape<Element, kDimK, kDimV, 2, 128, 2>;
template <typename Element, int kDimK, int kDimV>
using ShortForwardSm90Shape = RangeForwardSm90Shape<Element, kDimK, kDimV, 3, 80, 2>;

// The most keys that a row of a call for the short shape sees.
constexpr int64_t kMostKeysOfShort = 1024;

// Whether it ran: it does not where the GPU, the build or the tensors do not suit it.
template <typename Element, int kDimK, int kDimV>
bool try_range_forward_sm90(const RangeForwardParams& params, cudaStream_t stream) {
  using Long = LongForwardSm90Shape<Element, kDimK, kDimV>;
  using Short = ShortForwardSm90Shape<Element, kDimK, kDimV>;
  if (!range_forward_fits_sm90(params) || tensor_map_encoder() == nullptr ||
      !runs_on_this_device(range_forward_sm90<Long>, "attention over a range")) {
    return false;
  }
  if (min_of(params.num_keys, int64_t{params.visibility.window}) <= kMostKeysOfShort) {
    launch_range_forward_shape<Short>(params, stream);
  } else {
    launch_range_forward_shape<Long>(params, stream);
  }
  return true;
}

}  // namespace nsa
