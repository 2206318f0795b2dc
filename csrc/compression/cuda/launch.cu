// The kernels of compress: which element type, and whether loads and stores of several columns will do.
#include <initializer_list>
#include <stdexcept>
#include <type_traits>

#include "common/launch.cuh"
#include "compression/cuda/chunks.cuh"
#include "compression/cuda/launch.h"
#include "compression/cuda/mean.cuh"
#include "compression/cuda/shift.cuh"

namespace nsa {
namespace {

constexpr int kColumnsAtOnce = 4;  // of float32 sums: 16 bytes

// Whether `columns` at once, of a tensor whose elements have `bytes` bytes, lie where one load reads them.
bool aligned(const void* data, int64_t bytes, std::initializer_list<int64_t> strides, int64_t columns) {
  bool result = reinterpret_cast<uintptr_t>(data) % static_cast<uint64_t>(bytes * columns) == 0;
  for (const int64_t stride : strides) {
    result = result && stride % columns == 0;
  }
  return result;
}
bool aligned(const TensorView& t, int64_t bytes, int64_t columns) {
  return aligned(t.data, bytes, {t.batch_stride, t.token_stride, t.head_stride, t.width}, columns);
}
bool aligned(const ChunkRows& rows, int64_t bytes, int64_t columns) {
  return rows.data == nullptr || aligned(rows.data, bytes, {rows.row_stride, rows.head_stride}, columns);
}

// `width` columns of each of `heads` heads of each of `tokens` tokens, kWidth columns at a time.
RowItems items_of(int64_t tokens, int32_t heads, int32_t width, int columns_at_once) {
  const auto columns = static_cast<uint32_t>(width / columns_at_once);
  const uint32_t per_token = columns * static_cast<uint32_t>(heads);
  const int64_t count = tokens * per_token;
  if (count > 0x7fffffff) {
    throw std::runtime_error("nsa_torch: compress: 2^31 or more numbers in one chunk");
  }
  RowItems items{.heads = heads, .width = width, .per_token = per_token, .count = static_cast<uint32_t>(count)};
  if (count > 0) {
    items.by_columns = Divisor(columns);
    items.by_token = Divisor(per_token);
  }
  return items;
}

template <typename Params>
void launch_rows(void (*kernel)(Params), int64_t rows, cudaStream_t stream, const char* name, const Params& params) {
  if (params.items.count == 0) {
    return;
  }
  const int threads = static_cast<int>(min_of(256, ceil_div(params.items.count, 32) * 32));
  launch(kernel, rows, threads, 0, stream, name, params);
}

// Calls with a zero of the element type.
template <typename Run>
void with_element(ElementType type, const Run& run) {
  switch (type) {
    case ElementType::kFloat32:
      return run(float{});
    case ElementType::kFloat16:
      return run(Half{});
    case ElementType::kBFloat16:
      return run(BFloat16{});
  }
}

// Calls with kMost columns at once, or with one.
template <int kMost, typename Run>
void with_width(bool several, const Run& run) {
  if (several) {
    run(std::integral_constant<int, kMost>());
  } else {
    run(std::integral_constant<int, 1>());
  }
}

// The same memory, in units of `size` elements.
TensorView in_units(const TensorView& t, int32_t size) {
  return {.data = t.data,
          .batch_stride = t.batch_stride / size,
          .token_stride = t.token_stride / size,
          .head_stride = t.head_stride / size,
          .width = t.width / size};
}
ChunkRows in_units(const ChunkRows& rows, int32_t size) {
  return {.data = rows.data, .row_stride = rows.row_stride / size, .head_stride = rows.head_stride / size};
}

// Calls with a zero of the unit to copy, and params that count it.
template <typename Run>
void with_unit(const BlockLayout& layout, const TensorView& tokens, int32_t heads, const ChunkRows& chunks,
               ElementType type, const Run& run) {
  const int32_t bytes = type == ElementType::kFloat32 ? 4 : 2;
  const int32_t most = 16 / bytes;
  const bool wide = aligned(tokens, bytes, most) && aligned(chunks, bytes, most);
  const int32_t size = wide ? most : 1;
  const TensorView token_units = in_units(tokens, size);
  const MoveChunksParams params{.layout = layout,
                                .items = items_of(layout.block_stride, heads, token_units.width, 1),
                                .tokens = token_units,
                                .chunks = in_units(chunks, size)};
  if (wide) {
    run(uint4{}, params);
  } else if (bytes == 4) {
    run(uint32_t{}, params);
  } else {
    run(uint16_t{}, params);
  }
}

}  // namespace

void launch_packed_layout(const BlockLayout& layout, cudaStream_t stream) {
  launch(sum_up_blocks, 1, 32, 0, stream, "blocks of sequences", layout);
  launch(fill_tables, ceil_div(layout.num_chunks, kTableThreads), kTableThreads, 0, stream, "rows of blocks", layout);
}

void launch_gather_chunks(const BlockLayout& layout, const TensorView& x, int32_t heads, const ChunkRows& chunks,
                          ElementType type, cudaStream_t stream) {
  with_unit(layout, x, heads, chunks, type, [&](auto unit, const MoveChunksParams& params) {
    launch_rows(gather_chunks<decltype(unit)>, layout.num_chunks, stream, "chunks", params);
  });
}

void launch_scatter_chunks(const BlockLayout& layout, const ChunkRows& grad_chunks, int32_t heads,
                           const TensorView& grad_x, ElementType type, cudaStream_t stream) {
  with_unit(layout, grad_x, heads, grad_chunks, type, [&](auto unit, const MoveChunksParams& params) {
    launch_rows(scatter_chunks<decltype(unit)>, layout.num_groups, stream, "gradients of chunks", params);
  });
}

void launch_mean_forward(const BlockLayout& layout, const TensorView& x, int32_t heads, const ChunkRows& out,
                         ElementType type, cudaStream_t stream) {
  with_element(type, [&](auto zero) {
    constexpr int kMost = 16 / sizeof(zero);
    with_width<kMost>(aligned(x, sizeof(zero), kMost) && aligned(out, sizeof(zero), kMost), [&](auto width) {
      const MeanParams params{
          .layout = layout, .items = items_of(1, heads, x.width, width()), .tokens = x, .blocks = out};
      launch_rows(mean_forward<decltype(zero), width()>, layout.num_blocks, stream, "means of blocks", params);
    });
  });
}

void launch_mean_backward(const BlockLayout& layout, const ChunkRows& grad_out, int32_t heads, const TensorView& grad_x,
                          ElementType type, cudaStream_t stream) {
  with_element(type, [&](auto zero) {
    constexpr int kMost = 16 / sizeof(zero);
    with_width<kMost>(aligned(grad_x, sizeof(zero), kMost) && aligned(grad_out, sizeof(zero), kMost), [&](auto width) {
      const MeanParams params{.layout = layout,
                              .items = items_of(layout.block_stride, heads, grad_x.width, width()),
                              .tokens = grad_x,
                              .blocks = grad_out};
      launch_rows(mean_backward<decltype(zero), width()>, layout.num_groups, stream, "gradients of means", params);
    });
  });
}

void launch_shift_and_add(ShiftAddParams params, Activation activation, ElementType type, cudaStream_t stream) {
  const int32_t columns = params.items.width;
  with_element(type, [&](auto zero) {
    using Element = decltype(zero);
    const bool several = columns % kColumnsAtOnce == 0 && aligned(params.parts, sizeof(float), kColumnsAtOnce) &&
                         aligned(params.out, sizeof(zero), kColumnsAtOnce);
    with_width<kColumnsAtOnce>(several, [&](auto width) {
      params.items = items_of(1, params.items.heads, columns, width());
      const auto kernel = activation == Activation::kGelu ? shift_and_add<float, Element, width(), true>
                                                          : shift_and_add<float, Element, width(), false>;
      launch_rows(kernel, params.layout.num_blocks, stream, "sums of shifted parts", params);
    });
  });
}

void launch_mask_blocks(ShiftAddParams params, ElementType type, cudaStream_t stream) {
  const int32_t columns = params.items.width;
  with_element(type, [&](auto zero) {
    using Element = decltype(zero);
    const bool several = columns % kColumnsAtOnce == 0 && aligned(params.parts, sizeof(zero), kColumnsAtOnce) &&
                         aligned(params.out, sizeof(zero), kColumnsAtOnce);
    with_width<kColumnsAtOnce>(several, [&](auto width) {
      params.items = items_of(1, params.items.heads, columns, width());
      launch_rows(shift_and_add<Element, Element, width(), false>, params.layout.num_blocks, stream, "rows of blocks",
                  params);
    });
  });
}

void launch_shift_and_spread(SpreadParams params, Activation activation, ElementType type, cudaStream_t stream) {
  const int32_t columns = params.items.width;
  const bool gelu = activation == Activation::kGelu;
  with_element(type, [&](auto zero) {
    using Element = decltype(zero);
    const bool several = columns % kColumnsAtOnce == 0 &&
                         aligned(params.grad, gelu ? sizeof(float) : sizeof(zero), kColumnsAtOnce) &&
                         aligned(params.parts, sizeof(float), kColumnsAtOnce) &&
                         aligned(params.grad_parts, sizeof(zero), kColumnsAtOnce);
    with_width<kColumnsAtOnce>(several, [&](auto width) {
      params.items = items_of(1, params.items.heads, columns, width());
      const auto kernel = gelu ? shift_and_spread<Element, width(), true> : shift_and_spread<Element, width(), false>;
      launch_rows(kernel, params.layout.num_chunks, stream, "gradients of shifted parts", params);
    });
  });
}

}  // namespace nsa
