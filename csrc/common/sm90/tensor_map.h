// Host: maps that tell the copy engine where a tensor's boxes lie.
#pragma once

#include <cudaTypedefs.h>
#include <cuda_runtime.h>

#include "common/check.h"
#include "common/params.h"

namespace nsa {

// The driver's function, found through the runtime, so that nothing links to the driver; null where it has none.
inline PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder() {
  static const auto encoder = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult result{};
    check_cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &result),
               "cuTensorMapEncodeTiled");
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(result == cudaDriverEntryPointSuccess ? entry : nullptr);
  }();
  return encoder;
}

// Boxes of 64 columns, `heads` heads and `tokens` tokens of a 16-bit (batch, length, all_heads, D) tensor, swizzled by
// 128 bytes; zeros outside. Coordinates: column, head, token, batch.
inline CUtensorMap tensor_map(const TensorView& tensor, ElementType type, int64_t batch, int64_t length,
                              int64_t all_heads, uint32_t heads, uint32_t tokens, const char* name) {
  const auto sizes = [](int64_t size) { return static_cast<cuuint64_t>(size < 1 ? 1 : size); };
  const cuuint64_t dims[4] = {sizes(tensor.width), sizes(all_heads), sizes(length), sizes(batch)};
  // Dimensions of size 1 may have any stride.
  const auto bytes = [](int64_t stride, cuuint64_t size) {
    return static_cast<cuuint64_t>(size == 1 ? 16 : 2 * stride);
  };
  const cuuint64_t strides[3] = {bytes(tensor.head_stride, dims[1]), bytes(tensor.token_stride, dims[2]),
                                 bytes(tensor.batch_stride, dims[3])};
  const cuuint32_t box[4] = {64, heads, tokens, 1};
  const cuuint32_t steps[4] = {1, 1, 1, 1};
  CUtensorMap map;
  const CUresult result = tensor_map_encoder()(
      &map, type == ElementType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4,
      tensor.data, dims, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error(std::string("nsa_torch: ") + name + ": no tensor map for these strides");
  }
  return map;
}

}  // namespace nsa
