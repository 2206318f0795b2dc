// The Hopper kernel of attention over a range against a plain float32 one, and its time beside the sm_80 kernel's. No
// torch:
//   nvcc -std=c++20 -O3 -I csrc -DNSA_BOUNDED_WAITS -gencode=arch=compute_90a,code=sm_90a \
//     tests/cuda/range_forward_sm90.cu csrc/attention/launch.cu csrc/attention/instantiations/*.cu csrc/nsa/gates.cu \
//     -o range_forward_sm90
//   ./range_forward_sm90 [check | dispatch | time]
// `dispatch` alone also runs where it is built for 8.0 only, with the sm_80 kernels.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <string>
#include <vector>

#include "attention/launch.h"
#include "attention/launch_sm80.cuh"
#include "attention/launch_sm90.cuh"
#include "device_data.h"
#include "nsa/launch.h"

using namespace nsa;

namespace {

struct Errors {
  float out;
  float lse;
  unsigned long long first_wrong;  // row number, or ~0
  float got, wanted;
};

// One block a row, by the definition: scores of the visible keys, one after the other in each warp; warps merge.
template <typename Element>
__global__ void compare_rows(const __grid_constant__ RangeForwardParams p, bool skip_odd, int64_t step, float tolerance,
                             Errors* errors) {
  const Sequences& s = p.sequences;
  const int64_t row = blockIdx.x * step;
  const int heads = s.heads_kv * s.group;
  const int head = static_cast<int>(row % heads);
  const int64_t token = row / heads;
  const Tile at = find_query(s, token);
  if (s.packed() && (token < s.cumulative_q[0] || token >= s.cumulative_q[s.batch])) {
    return;
  }
  if (skip_odd && at.sequence % 2 == 1) {
    return;
  }
  const SequencePlace place = place_of(s, at.sequence);
  const KeysPlace keys = keys_of(place, p.visibility, p.compressed);
  const int position = place.offset + at.index;
  const int begin = p.visibility.begin(position);
  const int end = min(p.visibility.end(position), keys.length);
  const Element* q = p.q.row<Element>(place.batch, place.q_begin + at.index, head);
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  constexpr int kWarps = 4;
  float maximum = kMinusInfinity;
  float sum = 0.f;
  float out[8] = {};
  for (int key = begin + warp; key < end; key += kWarps) {
    const Element* k = p.k.row<Element>(place.batch, keys.begin + key, head / s.group);
    const Element* v = p.v.row<Element>(place.batch, keys.begin + key, head / s.group);
    float score = 0.f;
    for (int i = lane; i < p.q.width; i += 32) {
      score += to_float(q[i]) * to_float(k[i]);
    }
    for (int bit = 16; bit > 0; bit /= 2) {
      score += __shfl_xor_sync(0xffffffffu, score, bit);
    }
    score *= p.scale;
    const float highest = fmaxf(maximum, score);
    const float factor = maximum == kMinusInfinity ? 0.f : expf(maximum - highest);
    const float weight = expf(score - highest);
    sum = sum * factor + weight;
    maximum = highest;
    for (int i = 0; i < 8; ++i) {
      const int column = lane + 32 * i;
      out[i] = out[i] * factor + (column < p.v.width ? weight * to_float(v[column]) : 0.f);
    }
  }
  __shared__ float maxima[kWarps], sums[kWarps], outs[kWarps][256];
  for (int i = 0; i < 8; ++i) {
    outs[warp][lane + 32 * i] = out[i];
  }
  maxima[warp] = maximum;
  sums[warp] = sum;
  __syncthreads();
  if (warp != 0) {
    return;
  }
  float highest = kMinusInfinity;
  for (int w = 0; w < kWarps; ++w) {
    highest = fmaxf(highest, maxima[w]);
  }
  float total = 0.f;
  for (int w = 0; w < kWarps; ++w) {
    total += maxima[w] == kMinusInfinity ? 0.f : sums[w] * expf(maxima[w] - highest);
  }
  const Element* got =
      p.out.data == nullptr ? nullptr : p.out.row<Element>(place.batch, place.q_begin + at.index, head);
  const auto note = [&](float value, float wanted, float allowed, float* to) {
    const float error = value == wanted ? 0.f : fabsf(value - wanted);
    if (!(error <= allowed)) {
      if (atomicMin(&errors->first_wrong, static_cast<unsigned long long>(row)) > row) {
        errors->got = value;
        errors->wanted = wanted;
      }
    }
    atomicMax(reinterpret_cast<int*>(to), __float_as_int(error == error ? error : __int_as_float(0x7f800000)));
  };
  for (int column = lane; column < p.v.width; column += 32) {
    float value = 0.f;
    for (int w = 0; w < kWarps; ++w) {
      value += maxima[w] == kMinusInfinity ? 0.f : outs[w][column] * expf(maxima[w] - highest) / total;
    }
    if (got != nullptr) {
      note(to_float(got[column]), value, tolerance, &errors->out);
    }
    if (p.sum.out != nullptr) {
      const auto gate = [&](int b) { return load_gate(p.sum.gates, place.batch, place.q_begin + at.index, head, b); };
      const auto element = [&](const void* data) {
        TensorView of = p.out;
        of.data = const_cast<void*>(data);
        return to_float(of.row<Element>(place.batch, place.q_begin + at.index, head)[column]);
      };
      const float wanted = gate(0) * element(p.sum.others[0]) + gate(1) * element(p.sum.others[1]) + gate(2) * value;
      note(element(p.sum.out), wanted, tolerance * (1.f + fabsf(wanted) / 4.f), &errors->out);
    }
  }
  if (lane == 0) {
    note(p.lse.at(place.batch, head, place.q_begin + at.index), total > 0.f ? highest + logf(total) : kMinusInfinity,
         2e-3f, &errors->lse);
  }
}

struct Case {
  const char* name;
  int64_t batch, tokens_q, tokens_k;
  int heads_kv, group, dim_k, dim_v;
  int stride, first_seen, window;  // window 0: none
  std::vector<int32_t> cu_q{}, cu_k{};
  bool poison =
      false;        // NaN in k and v of every other packed sequence, whose rows are not compared, and of unused keys
  int padding = 0;  // elements between heads
  std::vector<int32_t> used{};
  bool gated = false;  // the kernel also takes the gated sum with two other branches
};

template <typename Element>
struct Problem {
  const Case c;
  int64_t keys;
  Device<Element> q, k, v, out;
  Device<Element> others[2], gates, sum;
  Device<float> lse;
  Device<int32_t> cu_q, cu_k, cu_cmp, used;
  RangeForwardParams params{};

  static int64_t blocks(const Case& c, int64_t length) {
    return length <= c.first_seen ? 0 : (length - 1 - c.first_seen) / c.stride + 1;
  }
  static std::vector<int32_t> cumulative_blocks(const Case& c) {
    std::vector<int32_t> sums(1, 0);
    for (size_t i = 1; i < c.cu_k.size(); ++i) {
      sums.push_back(sums.back() + static_cast<int32_t>(blocks(c, c.cu_k[i] - c.cu_k[i - 1])));
    }
    return sums;
  }
  static int64_t count_keys(const Case& c) {
    return c.stride == 1 ? c.tokens_k : c.cu_k.empty() ? blocks(c, c.tokens_k) : cumulative_blocks(c).back();
  }

  explicit Problem(const Case& of)
      : c(of),
        keys(count_keys(of)),
        q(c.batch * c.tokens_q * c.heads_kv * c.group * (c.dim_k + c.padding)),
        k(c.batch * keys * c.heads_kv * (c.dim_k + c.padding)),
        v(c.batch * keys * c.heads_kv * (c.dim_v + c.padding)),
        out(c.batch * c.tokens_q * c.heads_kv * c.group * c.dim_v),
        others{Device<Element>(c.gated ? out.size : 0), Device<Element>(c.gated ? out.size : 0)},
        gates(c.gated ? 3 * c.batch * c.tokens_q * c.heads_kv * c.group : 0),
        sum(c.gated ? out.size : 0),
        lse(c.batch * c.tokens_q * c.heads_kv * c.group),
        cu_q(c.cu_q.size()),
        cu_k(c.cu_k.size()),
        cu_cmp(c.cu_k.size()),
        used(c.used.size()) {
    fill_normal<<<1024, 256>>>(q.data, q.size, 1);
    fill_normal<<<1024, 256>>>(k.data, k.size, 2);
    fill_normal<<<1024, 256>>>(v.data, v.size, 3);
    fill_value<<<1024, 256>>>(out.data, out.size, std::numeric_limits<float>::quiet_NaN());
    fill_value<<<1024, 256>>>(lse.data, lse.size, std::numeric_limits<float>::quiet_NaN());
    const int heads = c.heads_kv * c.group;
    const bool packed = !c.cu_k.empty();
    const std::vector<int32_t> cmp = cumulative_blocks(c);
    if (packed) {
      cu_q.set(c.cu_q);
      cu_k.set(c.cu_k);
      cu_cmp.set(cmp);
      used.set(c.used);
    }
    if (c.poison) {
      const float nan = std::numeric_limits<float>::quiet_NaN();
      const std::vector<int32_t>& cu = c.stride == 1 ? c.cu_k : cmp;
      const auto spoil = [&](int64_t begin, int64_t end) {
        const int64_t count = (end - begin) * c.heads_kv;
        fill_value<<<64, 256>>>(k.data + begin * c.heads_kv * (c.dim_k + c.padding), count * (c.dim_k + c.padding),
                                nan);
        fill_value<<<64, 256>>>(v.data + begin * c.heads_kv * (c.dim_v + c.padding), count * (c.dim_v + c.padding),
                                nan);
      };
      for (size_t i = 0; i + 1 < cu.size(); ++i) {
        if (i % 2 == 1) {
          spoil(cu[i], cu[i + 1]);
        } else if (!c.used.empty()) {
          spoil(cu[i] + (c.stride == 1 ? c.used[i] : blocks(c, c.used[i])), cu[i + 1]);
        }
      }
    }
    const auto view = [&](void* data, int64_t length, int64_t all_heads, int width, int padding) {
      const int64_t head = width + padding;
      return TensorView{data, packed ? 0 : length * all_heads * head, all_heads * head, head, width};
    };
    params.sequences = {.batch = packed ? static_cast<int32_t>(c.cu_k.size()) - 1 : static_cast<int32_t>(c.batch),
                        .heads_kv = c.heads_kv,
                        .group = c.group,
                        .by_group = Divisor(static_cast<uint32_t>(c.group)),
                        .length_q = c.tokens_q,
                        .length_k = c.tokens_k,
                        .cumulative_q = packed ? cu_q.data : nullptr,
                        .cumulative_k = packed ? cu_k.data : nullptr,
                        .used_k = c.used.empty() ? nullptr : used.data,
                        .cumulative_cmp = packed && c.stride != 1 ? cu_cmp.data : nullptr};
    params.visibility = {.stride = c.stride,
                         .first_seen = c.first_seen,
                         .window = c.window == 0 ? Visibility::kNoWindow : c.window,
                         .by_stride = Divisor(static_cast<uint32_t>(c.stride))};
    params.compressed = c.stride != 1;
    params.scale = 1.f / std::sqrt(static_cast<float>(c.dim_k));
    params.q = view(q.data, c.tokens_q, heads, c.dim_k, c.padding);
    params.k = view(k.data, keys, c.heads_kv, c.dim_k, c.padding);
    params.v = view(v.data, keys, c.heads_kv, c.dim_v, c.padding);
    params.out = view(out.data, c.tokens_q, heads, c.dim_v, 0);
    params.lse = {lse.data, packed ? 0 : heads * c.tokens_q, c.tokens_q};
    params.num_keys = keys;
    params.sum = {};
    if (c.gated) {
      fill_normal<<<1024, 256>>>(others[0].data, out.size, 4);
      fill_normal<<<1024, 256>>>(others[1].data, out.size, 5);
      fill_normal<<<1024, 256>>>(gates.data, gates.size, 6);
      fill_value<<<1024, 256>>>(sum.data, out.size, std::numeric_limits<float>::quiet_NaN());
      params.sum = {.gates = {gates.data, kElementType<Element>, packed ? 0 : 3 * heads * c.tokens_q, 3 * heads, 3, 1},
                    .others = {others[0].data, others[1].data},
                    .out = sum.data};
    }
  }

  // Pairs of a query head and a key it sees. Packed sequences have as many keys as queries.
  double pairs() const {
    double sum = 0;
    size_t sequence = 0;
    for (int64_t t = 0; t < c.tokens_q; ++t) {
      while (!c.cu_q.empty() && c.cu_q[sequence + 1] <= t) {
        ++sequence;
      }
      const int64_t of_sequence = c.cu_q.empty() ? c.tokens_k - c.tokens_q + t : t - c.cu_q[sequence];
      const auto position = static_cast<int32_t>(of_sequence);
      sum += params.visibility.end(position) - params.visibility.begin(position);
    }
    return sum * c.batch * c.heads_kv * c.group;
  }
};

using Launch = void (*)(const RangeForwardParams&, cudaStream_t);

// What the op calls, replayed from a graph.
template <typename Element>
void captured(const RangeForwardParams& p, cudaStream_t) {
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t replay;
  check_cuda(cudaStreamCreate(&stream), "stream");
  check_cuda(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "capture");
  launch_range_forward(p, kElementType<Element>, stream);
  check_cuda(cudaStreamEndCapture(stream, &graph), "capture");
  check_cuda(cudaGraphInstantiate(&replay, graph, 0), "graph");
  check_cuda(cudaGraphLaunch(replay, stream), "graph");
  check_cuda(cudaStreamSynchronize(stream), "graph");
  cudaGraphExecDestroy(replay);
  cudaGraphDestroy(graph);
  cudaStreamDestroy(stream);
}

struct Tally {
  int right = 0, wrong = 0, left_out = 0;
  float out = 0.f, lse = 0.f;
} tally;

void print_tally(const char* what) {
  std::printf("%s: %d right, %d wrong, %d fall back; largest errors of the right ones: out %.1e, lse %.1e\n", what,
              tally.right, tally.wrong, tally.left_out, tally.out, tally.lse);
  tally = {};
}

template <typename Element>
void check(Problem<Element>& problem, const char* kernel, Launch launch_kernel, int64_t rows_at_most = 1 << 18) {
  const RangeForwardParams& p = problem.params;
  if (!range_forward_fits_sm90(p)) {
    ++tally.left_out;
    if (launch_kernel != static_cast<Launch>(captured<Element>)) {
      return;
    }
  }
  const Errors none{0.f, 0.f, ~0ull, 0.f, 0.f};
  Device<Errors> errors(1);
  errors.set({none});
  launch_kernel(p, nullptr);
  check_cuda(cudaDeviceSynchronize(), problem.c.name);
  const int64_t rows = problem.c.batch * problem.c.tokens_q * problem.c.heads_kv * problem.c.group;
  const int64_t step = std::max<int64_t>(1, rows / rows_at_most) | 1;
  const float tolerance = sizeof(Element) == 2 && __is_same(Element, Half) ? 4e-3f : 3e-2f;
  compare_rows<Element>
      <<<static_cast<unsigned>((rows + step - 1) / step), 128>>>(p, problem.c.poison, step, tolerance, errors.data);
  Errors e{};
  check_cuda(cudaMemcpy(&e, errors.data, sizeof(e), cudaMemcpyDeviceToHost), "compare");
  if (e.first_wrong == ~0ull) {
    ++tally.right;
    tally.out = std::max(tally.out, e.out);
    tally.lse = std::max(tally.lse, e.lse);
    return;
  }
  const auto heads = static_cast<unsigned long long>(problem.c.heads_kv * problem.c.group);
  if (++tally.wrong <= 8) {
    std::printf("%-20s %-8s out %.1e lse %.1e WRONG first at token %llu head %llu: %g, wanted %g\n", problem.c.name,
                kernel, e.out, e.lse, e.first_wrong / heads, e.first_wrong % heads, e.got, e.wanted);
  }
  std::fflush(stdout);
}

// In turns, so that a GPU that slows down as it warms up slows all of them.
template <typename Element>
void time_kernels(Problem<Element>& problem, const std::vector<std::pair<const char*, Launch>>& kernels) {
  constexpr int kWarmUps = 3;
  constexpr int kRepeats = 20;
  cudaEvent_t begin, end;
  cudaEventCreate(&begin);
  cudaEventCreate(&end);
  std::vector<std::vector<float>> times(kernels.size());
  for (int i = 0; i < kRepeats + kWarmUps; ++i) {
    for (size_t kernel = 0; kernel < kernels.size(); ++kernel) {
      cudaEventRecord(begin);
      kernels[kernel].second(problem.params, nullptr);
      cudaEventRecord(end);
      check_cuda(cudaEventSynchronize(end), problem.c.name);
      float ms = 0.f;
      cudaEventElapsedTime(&ms, begin, end);
      if (i >= kWarmUps) {
        times[kernel].push_back(ms);
      }
    }
  }
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  const double flops = 2.0 * (problem.c.dim_k + problem.c.dim_v) * problem.pairs();
  std::printf("%s:", problem.c.name);
  for (size_t kernel = 0; kernel < kernels.size(); ++kernel) {
    std::sort(times[kernel].begin(), times[kernel].end());
    const float ms = times[kernel][times[kernel].size() / 2];
    std::printf("  %s %.3f (%.0f)", kernels[kernel].first, ms, flops / ms * 1e-9);
  }
  std::printf("\n");
  std::fflush(stdout);
}

// Through the dispatch, which must take it.
template <typename Element, int kDimK, int kDimV>
void dispatched(const RangeForwardParams& p, cudaStream_t stream) {
  if (!try_range_forward_sm90<Element, kDimK, kDimV>(p, stream)) {
    std::printf("the dispatch refused: ");
  }
}

#include "range_variants.h"

}  // namespace

int main(int argc, char** argv) {
  const std::string what = argc > 1 ? argv[1] : "all";
  if (what == "all" || what == "check") {
    run_checks();
  }
  if (what == "all" || what == "dispatch") {
    run_dispatch();
  }
  if (what == "all" || what == "time") {
    run_times();
  }
  return 0;
}
