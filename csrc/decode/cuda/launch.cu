// Obeys the plan of a decoding step.
#include "common/dispatch.cuh"
#include "decode/choose.cuh"
#include "decode/cuda/kernels.h"
#include "decode/cuda/launch.h"
#include "decode/launch.cuh"
#include "decode/plain/attention.cuh"

namespace nsa {
namespace {

// The kernels of one element type without tensor cores.
template <typename Element>
struct DecodePlain {
  static void ranges(const DecodeParams& params, const DecodePlan& plan, cudaStream_t stream) {
    const dim3 grid(params.all_splits(), params.units(), ceil_div(params.rows(), decode_plain::kRows));
    launch_in_chain(decode_ranges_plain<Element>, grid, decode_plain::kThreads, plan.launches.of[0].tile, true, stream,
                    "decoding: ranges", params);
  }
  static void selected(const DecodeParams& params, const DecodePlan& plan, cudaStream_t stream) {
    const dim3 grid(params.parts, params.units(), params.queries * ceil_div(params.group, decode_plain::kRows));
    launch_in_chain(decode_selected_plain<Element>, grid, decode_plain::kThreads, plan.launches.of[2].tile, false,
                    stream, "decoding: selected", params);
  }
};

void launch_choose(const DecodeParams& params, const DecodePlan& plan, cudaStream_t stream) {
  const int64_t rows_at_once = decode_tiles::kChooseWarps / params.adding_warps;
  const dim3 grid(params.queries + ceil_div(params.rows(), rows_at_once), params.units());
  launch_in_chain(decode_choose, grid, decode_tiles::kChooseThreads, plan.launches.of[1].tile, false, stream,
                  "decoding: choice", params);
}

template <typename Kernels>
void launch_all(const DecodeParams& params, const DecodePlan& plan, cudaStream_t stream) {
  Kernels::ranges(params, plan, stream);
  launch_choose(params, plan, stream);
  Kernels::selected(params, plan, stream);
}

}  // namespace

void launch_decode(const DecodeParams& params, const DecodePlan& plan, ElementType type, cudaStream_t stream) {
  if (plan.kernel.machine == Machine::kPlain) {
    switch (type) {
      case ElementType::kFloat16:
        return launch_all<DecodePlain<Half>>(params, plan, stream);
      case ElementType::kBFloat16:
        return launch_all<DecodePlain<BFloat16>>(params, plan, stream);
      default:
        return launch_all<DecodePlain<float>>(params, plan, stream);
    }
  }
  with_kernel(plan.kernel.machine, type, params.q.width, params.out.width,
              [&](auto machine, auto element, auto k, auto v) {
                if constexpr (machine == Machine::kSm90) {
                  DecodeSm90<decltype(element), k, v>::ranges(params, plan, stream);
                  DecodeSm90<decltype(element), k, v>::selected(params, plan, stream);
                } else {
                  launch_all<DecodeSm80<decltype(element), k, v>>(params, plan, stream);
                }
              });
}

}  // namespace nsa
