// The Hopper kernel of the gradient of q over a range against a plain float32 one, and its time beside the sm_80
// kernel's. No torch:
//   nvcc -std=c++20 -O3 -I csrc -DNSA_BOUNDED_WAITS -gencode=arch=compute_90a,code=sm_90a \
//     tests/cuda/range_backward_query_sm90.cu -o range_backward_query_sm90
//   ./range_backward_query_sm90 [check | time]
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <string>
#include <vector>

#include "attention/launch_query_sm90.cuh"
#include "attention/launch_sm80.cuh"
#include "device_data.h"

using namespace nsa;

namespace {

constexpr int kWarps = 4;

__device__ float warp_sum(float x) {
  for (int bit = 16; bit > 0; bit /= 2) {
    x += __shfl_xor_sync(0xffffffffu, x, bit);
  }
  return x;
}

struct RowKeys {
  SequencePlace place;
  KeysPlace keys;
  int sequence, query, head, begin, end;
};

template <typename Params>
__device__ bool find_row(const Params& p, int64_t row, RowKeys& to) {
  const Sequences& s = p.sequences;
  const int heads = s.heads_kv * s.group;
  const int64_t token = row / heads;
  if (s.packed() && (token < s.cumulative_q[0] || token >= s.cumulative_q[s.batch])) {
    return false;
  }
  const Tile at = find_query(s, token);
  to.sequence = at.sequence;
  to.query = at.index;
  to.head = static_cast<int>(row % heads);
  to.place = place_of(s, at.sequence);
  to.keys = keys_of(to.place, p.visibility, p.compressed);
  const int position = to.place.offset + at.index;
  to.begin = p.visibility.begin(position);
  to.end = min(p.visibility.end(position), to.keys.length);
  return true;
}

template <typename Element>
__device__ float dot(const Element* a, const Element* b, int width, int lane) {
  float sum = 0.f;
  for (int i = lane; i < width; i += 32) {
    sum += to_float(a[i]) * to_float(b[i]);
  }
  return warp_sum(sum);
}

// lse and delta of a row by the definition: a warp a row.
template <typename Element>
__global__ void fill_rows(const __grid_constant__ RangeBackwardParams p, int64_t rows) {
  const int64_t row = blockIdx.x * int64_t{kWarps} + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  RowKeys at;
  if (row >= rows || !find_row(p, row, at)) {
    return;
  }
  const int64_t token = at.place.q_begin + at.query;
  const Element* q = p.q.row<Element>(at.place.batch, token, at.head);
  const Element* grad_out = p.grad_out.row<Element>(at.place.batch, token, at.head);
  float maximum = kMinusInfinity;
  float sum = 0.f;
  float product = 0.f;
  for (int key = at.begin; key < at.end; ++key) {
    const int head_kv = at.head / p.sequences.group;
    const float score =
        p.scale * dot(q, p.k.row<Element>(at.place.batch, at.keys.begin + key, head_kv), p.q.width, lane);
    const float grad = dot(grad_out, p.v.row<Element>(at.place.batch, at.keys.begin + key, head_kv), p.v.width, lane);
    const float highest = fmaxf(maximum, score);
    const float factor = maximum == kMinusInfinity ? 0.f : expf(maximum - highest);
    const float weight = expf(score - highest);
    sum = sum * factor + weight;
    product = product * factor + weight * grad;
    maximum = highest;
  }
  if (lane == 0) {
    const float grad_lse = p.grad_lse.data == nullptr ? 0.f : p.grad_lse.at(at.place.batch, at.head, token);
    p.lse.at(at.place.batch, at.head, token) = sum > 0.f ? maximum + logf(sum) : kMinusInfinity;
    p.delta.at(at.place.batch, at.head, token) = (sum > 0.f ? product / sum : 0.f) - grad_lse;
  }
}

struct Errors {
  float relative;                  // of the row's root mean square
  unsigned long long first_wrong;  // row number, or ~0
  float got, wanted;
};

// One block a row, by the definition, from the kernel's own lse and delta.
template <typename Element>
__global__ void compare_rows(const __grid_constant__ RangeBackwardParams p, const Element* before, bool skip_odd,
                             int64_t step, float tolerance, Errors* errors) {
  const int64_t row = blockIdx.x * step;
  RowKeys at;
  if (!find_row(p, row, at) || (skip_odd && at.sequence % 2 == 1)) {
    return;
  }
  const int64_t token = at.place.q_begin + at.query;
  const int head_kv = at.head / p.sequences.group;
  const Element* q = p.q.row<Element>(at.place.batch, token, at.head);
  const Element* grad_out = p.grad_out.row<Element>(at.place.batch, token, at.head);
  const float lse = p.lse.at(at.place.batch, at.head, token);
  const float delta = p.delta.at(at.place.batch, at.head, token);
  const float gate = p.gate.data == nullptr ? 1.f : p.gate.at(at.place.batch, at.head, token);
  const float grad_lse = p.grad_lse.data == nullptr ? 0.f : p.grad_lse.at(at.place.batch, at.head, token);
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  float out[6] = {};
  float largest = 0.f;
  for (int key = at.begin + warp; key < at.end; key += kWarps) {
    const Element* k = p.k.row<Element>(at.place.batch, at.keys.begin + key, head_kv);
    const Element* v = p.v.row<Element>(at.place.batch, at.keys.begin + key, head_kv);
    const float probability = expf(p.scale * dot(q, k, p.q.width, lane) - lse);
    const float grad = dot(grad_out, v, p.v.width, lane);
    const float weight = probability > kWholeProbability<Element> ? grad_lse : probability * gate * (grad - delta);
    largest = fmaxf(largest, fabsf(probability * gate * grad) * p.scale);
    for (int i = 0; i < 6; ++i) {
      const int column = lane + 32 * i;
      out[i] += column < p.q.width ? p.scale * weight * to_float(k[column]) : 0.f;
    }
  }
  __shared__ float outs[kWarps][192], largests[kWarps];
  for (int i = 0; i < 6; ++i) {
    outs[warp][lane + 32 * i] = out[i];
  }
  largests[warp] = largest;
  __syncthreads();
  if (warp != 0) {
    return;
  }
  largest = fmaxf(fmaxf(largests[0], largests[1]), fmaxf(largests[2], largests[3]));
  float squares = 0.f;
  for (int i = 0; i < 6; ++i) {
    out[i] = outs[0][lane + 32 * i] + outs[1][lane + 32 * i] + outs[2][lane + 32 * i] + outs[3][lane + 32 * i];
    squares += out[i] * out[i];
  }
  const float root = sqrtf(warp_sum(squares) / p.q.width);
  const Element* got = p.grad_q.row<Element>(at.place.batch, token, at.head);
  for (int i = 0; i < 6; ++i) {
    const int column = lane + 32 * i;
    if (column >= p.q.width) {
      continue;
    }
    const float old = p.add_to_grad_q ? to_float(before[got - static_cast<Element*>(p.grad_q.data) + column]) : 0.f;
    const float wanted = out[i] + old;
    const float value = to_float(got[column]);
    const float error = value == wanted ? 0.f : fabsf(value - wanted);
    // Rounding of dS and of the result; and what cancels in dP - delta.
    const float tiny = __is_same(Element, Half) ? 1e-6f : 0.f;  // numbers below its normal ones
    const float allowed = tolerance * (root + fabsf(wanted) + fabsf(out[i])) + 2e-5f * largest + tiny;
    if (!(error <= allowed)) {
      if (atomicMin(&errors->first_wrong, static_cast<unsigned long long>(row)) > row) {
        errors->got = value;
        errors->wanted = wanted;
      }
    }
    if (root > 0.1f * largest) {
      atomicMax(reinterpret_cast<int*>(&errors->relative),
                __float_as_int(error == error ? fmaxf(error - tiny, 0.f) / (root + fabsf(wanted))
                                              : __int_as_float(0x7f800000)));
    }
  }
}

enum Rows { kGates, kGradLse, kPlain };

struct Case {
  std::string name;
  int64_t batch, tokens_q, tokens_k;
  int heads_kv, group, dim_k, dim_v;
  int stride, first_seen, window;  // window 0: none
  Rows rows = kGates;
  bool add = false;
  int padding = 0;  // elements between heads
  std::vector<int32_t> cu_q{}, cu_k{}, used{};
  bool poison = false;   // NaN in k and v of every other sequence, whose rows are not compared, and of unused keys
  bool by_hand = false;  // lse and delta are plausible numbers, not the call's
};

template <typename Element>
struct Problem {
  const Case c;
  int64_t keys, rows;
  Device<Element> q, k, v, grad_out, grad_q, before;
  Device<float> lse, delta, gate, grad_lse;
  Device<int32_t> cu_q, cu_k, cu_cmp, used;
  RangeBackwardParams params{};

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
  static constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

  explicit Problem(const Case& of)
      : c(of),
        keys(count_keys(of)),
        rows(c.batch * c.tokens_q * c.heads_kv * c.group),
        q(rows * (c.dim_k + c.padding)),
        k(c.batch * keys * c.heads_kv * (c.dim_k + c.padding)),
        v(c.batch * keys * c.heads_kv * (c.dim_v + c.padding)),
        grad_out(rows * (c.dim_v + c.padding)),
        grad_q(rows * (c.dim_k + c.padding)),
        before(grad_q.size),
        lse(rows),
        delta(rows),
        gate(rows),
        grad_lse(rows),
        cu_q(c.cu_q.size()),
        cu_k(c.cu_k.size()),
        cu_cmp(c.cu_k.size()),
        used(c.used.size()) {
    const auto normal = [&](auto& to, uint64_t seed) { fill_normal<<<1024, 256>>>(to.data, to.size, seed, 0.f, 1.f); };
    normal(q, 1);
    normal(k, 2);
    normal(v, 3);
    normal(grad_out, 4);
    normal(before, 5);
    fill_normal<<<1024, 256>>>(gate.data, rows, 6, 0.5f, 0.2f);
    normal(grad_lse, 7);
    const int heads = c.heads_kv * c.group;
    const bool packed = !c.cu_k.empty();
    const std::vector<int32_t> cmp = cumulative_blocks(c);
    if (packed) {
      cu_q.set(c.cu_q);
      cu_k.set(c.cu_k);
      cu_cmp.set(cmp);
      used.set(c.used);
    }
    const auto view = [&](void* data, int64_t length, int64_t all_heads, int width) {
      const int64_t head = width + c.padding;
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
    params.q = view(q.data, c.tokens_q, heads, c.dim_k);
    params.k = view(k.data, keys, c.heads_kv, c.dim_k);
    params.v = view(v.data, keys, c.heads_kv, c.dim_v);
    params.grad_out = view(grad_out.data, c.tokens_q, heads, c.dim_v);
    params.grad_q = view(grad_q.data, c.tokens_q, heads, c.dim_k);
    params.add_to_grad_q = c.add;
    const auto numbers = [&](Device<float>& from) {
      return RowView{from.data, packed ? 0 : heads * c.tokens_q, c.tokens_q};
    };
    params.lse = numbers(lse);
    params.delta = numbers(delta);
    params.gate = c.rows == kGates ? numbers(gate) : RowView{};
    params.grad_lse = c.rows == kGradLse ? numbers(grad_lse) : RowView{};
    params.num_keys = keys;
    params.splits = 1;
    if (c.by_hand) {
      fill_normal<<<1024, 256>>>(lse.data, rows, 8, std::log(static_cast<float>(c.window == 0 ? keys / 2 : c.window)),
                                 0.5f);
      fill_normal<<<1024, 256>>>(delta.data, rows, 9, 0.f, 1.f);
    } else {
      fill_rows<Element><<<static_cast<unsigned>(ceil_div(rows, kWarps)), 32 * kWarps>>>(params, rows);
    }
    if (c.poison) {
      const std::vector<int32_t>& cu = c.stride == 1 ? c.cu_k : cmp;
      const auto spoil = [&](int64_t begin, int64_t end) {
        const auto fill = [&](Device<Element>& x, int64_t head) {
          fill_value<<<64, 256>>>(x.data + begin * c.heads_kv * head, (end - begin) * c.heads_kv * head, kNaN);
        };
        fill(k, c.dim_k + c.padding);
        fill(v, c.dim_v + c.padding);
      };
      for (size_t i = 0; i + 1 < cu.size(); ++i) {
        if (i % 2 == 1) {
          spoil(cu[i], cu[i + 1]);
        } else if (!c.used.empty()) {
          spoil(cu[i] + (c.stride == 1 ? c.used[i] : blocks(c, c.used[i])), cu[i + 1]);
        }
      }
    }
  }

  // Pairs of a query head and a key it sees.
  double pairs() const {
    double sum = 0;
    for (int64_t t = 0; t < c.tokens_q; ++t) {
      const auto position = static_cast<int32_t>(c.tokens_k - c.tokens_q + t);
      sum += std::min<double>(params.visibility.end(position), keys) - params.visibility.begin(position);
    }
    return sum * c.batch * c.heads_kv * c.group;
  }
};

using Launch = void (*)(const RangeBackwardParams&, cudaStream_t);

struct Tally {
  int right = 0, wrong = 0, left_out = 0;
  float relative = 0.f;
} tally;

void print_tally(const char* what) {
  std::printf("%s: %d right, %d wrong, %d fall back; largest error of the right ones: %.1e\n", what, tally.right,
              tally.wrong, tally.left_out, tally.relative);
  tally = {};
  std::fflush(stdout);
}

template <typename Element>
void check(Problem<Element>& problem, const char* kernel, Launch launch_kernel, bool fits,
           int64_t rows_at_most = 1 << 17) {
  const RangeBackwardParams& p = problem.params;
  if (!fits) {
    ++tally.left_out;
    return;
  }
  Device<Errors> errors(1);
  errors.set({Errors{0.f, ~0ull, 0.f, 0.f}});
  if (p.add_to_grad_q) {
    check_cuda(cudaMemcpy(problem.grad_q.data, problem.before.data, problem.grad_q.size * sizeof(Element),
                          cudaMemcpyDeviceToDevice),
               "copy");
  } else {
    fill_value<<<1024, 256>>>(problem.grad_q.data, problem.grad_q.size, Problem<Element>::kNaN);
  }
  launch_kernel(p, nullptr);
  check_cuda(cudaDeviceSynchronize(), problem.c.name.c_str());
  const int64_t step = std::max<int64_t>(1, problem.rows / rows_at_most) | 1;
  const float tolerance = __is_same(Element, Half) ? 2.5e-3f : 2e-2f;
  compare_rows<Element><<<static_cast<unsigned>((problem.rows + step - 1) / step), 32 * kWarps>>>(
      p, problem.before.data, problem.c.poison, step, tolerance, errors.data);
  Errors e{};
  check_cuda(cudaMemcpy(&e, errors.data, sizeof(e), cudaMemcpyDeviceToHost), "compare");
  if (e.first_wrong == ~0ull) {
    ++tally.right;
    tally.relative = std::max(tally.relative, e.relative);
    return;
  }
  const auto heads = static_cast<unsigned long long>(problem.c.heads_kv * problem.c.group);
  if (++tally.wrong <= 8) {
    std::printf("%-20s %-8s error %.1e WRONG first at token %llu head %llu: %g, wanted %g\n", problem.c.name.c_str(),
                kernel, e.relative, e.first_wrong / heads, e.first_wrong % heads, e.got, e.wanted);
    std::fflush(stdout);
  }
}

using Variants = std::vector<std::pair<const char*, Launch>>;

// In turns, so that a GPU that slows down as it warms up slows all of them.
template <typename Element>
void time_kernels(Problem<Element>& problem, const Variants& kernels, int repeats) {
  constexpr int kWarmUps = 2;
  cudaEvent_t begin, end;
  cudaEventCreate(&begin);
  cudaEventCreate(&end);
  std::vector<std::vector<float>> times(kernels.size());
  for (int i = 0; i < repeats + kWarmUps; ++i) {
    for (size_t kernel = 0; kernel < kernels.size(); ++kernel) {
      cudaEventRecord(begin);
      kernels[kernel].second(problem.params, nullptr);
      cudaEventRecord(end);
      check_cuda(cudaEventSynchronize(end), problem.c.name.c_str());
      float ms = 0.f;
      cudaEventElapsedTime(&ms, begin, end);
      if (i >= kWarmUps) {
        times[kernel].push_back(ms);
      }
    }
  }
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  const double flops = 2.0 * (2 * problem.c.dim_k + problem.c.dim_v) * problem.pairs();
  std::printf("%s:", problem.c.name.c_str());
  for (size_t kernel = 0; kernel < kernels.size(); ++kernel) {
    std::sort(times[kernel].begin(), times[kernel].end());
    const float ms = times[kernel][times[kernel].size() / 2];
    std::printf("  %s %.3f (%.0f)", kernels[kernel].first, ms, flops / ms * 1e-9);
  }
  std::printf("\n");
  std::fflush(stdout);
}

template <typename Element, int kDimK, int kDimV>
void portable(const RangeBackwardParams& params, cudaStream_t stream) {
  using Shape = BackwardQueryShapeFor<Element, kDimK, kDimV>;
  const Sequences& s = params.sequences;
  launch(range_backward_query<Shape>, count_slots(s, s.length_q * s.group, Shape::kRows) * s.heads_kv, Shape::kThreads,
         Shape::kSharedBytes, stream, "gradient of q over a range", params);
}

std::vector<Case> cases(int dim_k, int dim_v) {
  const std::vector<int32_t> cu = {0, 781, 781, 782, 2048, 2900};
  const std::vector<int32_t> short_q = {0, 1, 2, 40, 64};
  const std::vector<int32_t> short_k = {0, 700, 712, 752, 1500};
  const std::vector<int32_t> odd = {0, 781, 900, 1782, 2048, 2900};
  const std::vector<int32_t> used_q = {0, 700, 800, 1682, 1948, 2788};
  const std::vector<int32_t> used = {730, 100, 882, 200, 840};
  std::vector<Case> all = {
      {"cmp 1k", 1, 1024, 1024, 2, 16, dim_k, dim_v, 16, 31, 0},
      {"cmp 1k add", 1, 1024, 1024, 2, 16, dim_k, dim_v, 16, 31, 0, kGates, true},
      {"window 1k", 1, 1024, 1024, 2, 16, dim_k, dim_v, 1, 0, 512},
      {"window 1k add", 1, 1024, 1024, 2, 16, dim_k, dim_v, 1, 0, 512, kGradLse, true},
      {"cmp 4k", 1, 4096, 4096, 4, 16, dim_k, dim_v, 16, 31, 0, kGradLse},
      {"causal 1k", 1, 1000, 1000, 1, 8, dim_k, dim_v, 1, 0, 0, kPlain},
      {"cmp b2 777", 2, 777, 777, 2, 4, dim_k, dim_v, 16, 31, 0},
      {"window b2 777", 2, 777, 777, 2, 4, dim_k, dim_v, 1, 0, 100, kGradLse},
      {"window 1", 1, 1, 1, 1, 16, dim_k, dim_v, 1, 0, 512},
      {"window 1 lse", 1, 1, 1, 1, 16, dim_k, dim_v, 1, 0, 512, kGradLse},
      {"window of 1", 1, 333, 333, 1, 16, dim_k, dim_v, 1, 0, 1, kGradLse},
      {"cmp 31", 1, 33, 33, 1, 16, dim_k, dim_v, 16, 31, 0},
      {"window q<k", 2, 67, 1531, 2, 16, dim_k, dim_v, 1, 0, 512},
      {"window q>k", 2, 500, 131, 2, 16, dim_k, dim_v, 1, 0, 64},
      {"cmp q<k", 1, 67, 4531, 2, 16, dim_k, dim_v, 16, 31, 0},
      {"narrow", 1, 700, 700, 2, 16, dim_k - 24, dim_v - 8, 1, 0, 512, kGates, true},
      {"padded", 1, 700, 700, 2, 16, dim_k, dim_v, 1, 0, 512, kGates, true, 8},
      {"packed window", 1, 2900, 2900, 2, 16, dim_k, dim_v, 1, 0, 512, kGates, false, 0, cu, cu},
      {"packed cmp", 1, 2900, 2900, 2, 16, dim_k, dim_v, 16, 31, 0, kGates, true, 0, cu, cu},
      {"packed short", 1, 64, 1500, 2, 8, dim_k, dim_v, 1, 0, 512, kGradLse, false, 0, short_q, short_k},
      {"poison window", 1, 2900, 2900, 2, 16, dim_k, dim_v, 1, 0, 512, kGates, true, 0, odd, odd, {}, true},
      {"poison cmp", 1, 2900, 2900, 2, 16, dim_k, dim_v, 16, 31, 0, kGates, false, 0, odd, odd, {}, true},
      {"poison used", 1, 2788, 2900, 2, 16, dim_k, dim_v, 1, 0, 512, kGates, false, 0, used_q, odd, used, true},
      {"poison used cmp", 1, 2788, 2900, 2, 16, dim_k, dim_v, 16, 31, 0, kGates, true, 0, used_q, odd, used, true},
  };
  for (const int group : {1, 2, 3, 5, 7, 8, 12, 14, 24, 32, 48, 64}) {
    all.push_back({"window G " + std::to_string(group), 2, 777, 777, 2, group, dim_k, dim_v, 1, 0, 300});
    all.push_back({"packed cmp G " + std::to_string(group), 1, 2900, 2900, 2, group, dim_k, dim_v, 4, 7, 0, kPlain,
                   false, 0, cu, cu});
  }
  return all;
}

template <typename Element, int kDimK, int kDimV>
void check_dims(const char* name, const Variants& variants) {
  for (const Case& c : cases(kDimK, kDimV)) {
    Problem<Element> problem(c);
    for (const auto& [kernel, launch_kernel] : variants) {
      check<Element>(problem, kernel, launch_kernel, range_backward_query_fits_sm90(problem.params));
    }
  }
  print_tally((std::string(name) + " " + std::to_string(kDimK) + "/" + std::to_string(kDimV)).c_str());
  for (const Case& c : cases(kDimK, kDimV)) {
    Problem<Element> problem(c);
    check<Element>(problem, "sm80", portable<Element, kDimK, kDimV>, true);
  }
  print_tally("  sm_80 kernel");
}

template <typename Element, int kDimK, int kDimV>
void time_dims(const char* name, Variants variants, const std::vector<int>& kilos) {
  std::printf("-- %s %d/%d, ms (TFLOP/s)\n", name, kDimK, kDimV);
  variants.push_back({"sm80", portable<Element, kDimK, kDimV>});
  for (const int64_t kilo : kilos) {
    for (const std::string kind : {"compressed ", "compressed, added ", "window ", "window, added "}) {
      const int64_t tokens = kilo * 1024;
      Case c{kind + std::to_string(kilo) + "k", 1, tokens, tokens, 4, 16, kDimK, kDimV, 1, 0, 512};
      if (kind[0] == 'c') {
        c.stride = 16;
        c.first_seen = 31;
        c.window = 0;
      }
      c.add = kind.find("added") != std::string::npos;
      c.by_hand = true;
      Problem<Element> problem(c);
      for (const auto& [kernel, launch_kernel] : variants) {
        check<Element>(problem, kernel, launch_kernel, true, 4096);
      }
      time_kernels<Element>(problem, variants, kilo > 32 ? 9 : 15);
    }
  }
  print_tally("checked");
}

#include "range_backward_query_variants.h"

}  // namespace

int main(int argc, char** argv) {
  const std::string what = argc > 1 ? argv[1] : "all";
  if (what == "all" || what == "check") {
    run_checks();
  }
  if (what == "all" || what == "time") {
    run_times();
  }
  return 0;
}
