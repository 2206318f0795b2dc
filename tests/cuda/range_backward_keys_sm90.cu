// The Hopper kernel of the gradients of k and v over a range against a plain float32 one, and its time beside the sm_80
// kernel's. No torch:
//   nvcc -std=c++20 -O3 -I csrc -DNSA_BOUNDED_WAITS -gencode=arch=compute_90a,code=sm_90a \
//     tests/cuda/range_backward_keys_sm90.cu -o range_backward_keys_sm90
//   ./range_backward_keys_sm90 [check | time | profile]
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "attention/launch_keys_sm90.cuh"
#include "attention/launch_sm80.cuh"
#include "backward_keys_testing.h"

using namespace nsa;

namespace {

// lse and delta of a row by the definition, a warp a row; or, of many keys, one that no score comes near.
template <typename Element>
__global__ void fill_rows(const __grid_constant__ RangeBackwardParams p, int64_t rows, bool exact) {
  const Sequences& s = p.sequences;
  const int64_t row = blockIdx.x * int64_t{kWarps} + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int heads = s.heads_kv * s.group;
  const int64_t token = row / heads;
  const int head = static_cast<int>(row % heads);
  if (row >= rows || (s.packed() && (token < s.cumulative_q[0] || token >= s.cumulative_q[s.batch]))) {
    return;
  }
  const Tile at = find_query(s, token);
  const SequencePlace place = place_of(s, at.sequence);
  const KeysPlace keys = keys_of(place, p.visibility, p.compressed);
  const int position = place.offset + at.index;
  const int begin = p.visibility.begin(position);
  const int end = min(p.visibility.end(position), keys.length);
  const int64_t place_token = place.q_begin + at.index;
  if (!exact) {
    if (lane == 0) {
      p.lse.at(place.batch, head, place_token) = end > begin ? logf(end - begin) + 4.f : kMinusInfinity;
      p.delta.at(place.batch, head, place_token) = 0.01f;
    }
    return;
  }
  const Element* q = p.q.row<Element>(place.batch, place_token, head);
  const Element* grad_out = p.grad_out.row<Element>(place.batch, place_token, head);
  float maximum = kMinusInfinity;
  float sum = 0.f;
  float product = 0.f;
  for (int key = begin; key < end; ++key) {
    const int64_t at_key = keys.begin + key;
    const float score = p.scale * dot(q, p.k.row<Element>(place.batch, at_key, head / s.group), p.q.width, lane);
    const float grad = dot(grad_out, p.v.row<Element>(place.batch, at_key, head / s.group), p.v.width, lane);
    const float highest = fmaxf(maximum, score);
    const float factor = maximum == kMinusInfinity ? 0.f : expf(maximum - highest);
    const float weight = expf(score - highest);
    sum = sum * factor + weight;
    product = product * factor + weight * grad;
    maximum = highest;
  }
  if (lane == 0) {
    const float grad_lse = p.grad_lse.data == nullptr ? 0.f : p.grad_lse.at(place.batch, head, place_token);
    p.lse.at(place.batch, head, place_token) = sum > 0.f ? maximum + logf(sum) : kMinusInfinity;
    p.delta.at(place.batch, head, place_token) = (sum > 0.f ? product / sum : 0.f) - grad_lse;
  }
}

// The gradients of a key by the definition, a block a key and KV head, and how far the kernel's are from them.

template <typename Element>
__global__ void compare_keys(const __grid_constant__ RangeBackwardParams p, bool skip_odd, Sums* sums) {
  const Sequences& s = p.sequences;
  const int head_kv = blockIdx.x % s.heads_kv;
  const Tile tile =
      find_tile(s, p.compressed ? s.cumulative_cmp : s.cumulative_k, 1, p.num_keys, 1, blockIdx.x / s.heads_kv);
  const SequencePlace place = place_of(s, tile.sequence);
  KeysPlace keys = keys_of(place, p.visibility, p.compressed);
  if (!s.packed()) {
    keys.length = static_cast<int32_t>(p.num_keys);
  }
  const int key = tile.index;
  if (key >= keys.length || (skip_odd && tile.sequence % 2 == 1)) {
    return;
  }
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const Element* k = p.k.row<Element>(place.batch, keys.begin + key, head_kv);
  const Element* v = p.v.row<Element>(place.batch, keys.begin + key, head_kv);
  float grad_k[6] = {};
  float grad_v[6] = {};
  const int64_t first = max_of(int64_t{p.visibility.first_position(key)} - place.offset, 0);
  const int64_t last = min_of(int64_t{p.visibility.last_position(key)} - place.offset, place.q_length - 1);
  for (int64_t row = first * s.group + warp; row < (last + 1) * s.group; row += kWarps) {
    const int64_t token = place.q_begin + row / s.group;
    const int head = static_cast<int>(head_kv * s.group + row % s.group);
    const Element* q = p.q.row<Element>(place.batch, token, head);
    const Element* grad_out = p.grad_out.row<Element>(place.batch, token, head);
    const float gate = p.gate.data == nullptr ? 1.f : p.gate.at(place.batch, head, token);
    const float weight = gate * expf(p.scale * dot(q, k, p.q.width, lane) - p.lse.at(place.batch, head, token));
    const float grad = weight * (dot(grad_out, v, p.v.width, lane) - p.delta.at(place.batch, head, token));
    for (int i = 0; i < 6; ++i) {
      const int column = lane + 32 * i;
      grad_k[i] += column < p.q.width ? grad * to_float(q[column]) : 0.f;
      grad_v[i] += column < p.v.width ? weight * to_float(grad_out[column]) : 0.f;
    }
  }
  add_errors<Element>(grad_k, grad_v, p.scale, p.grad_k.row<Element>(place.batch, keys.begin + key, head_kv),
                      p.grad_k.width, p.grad_v.row<Element>(place.batch, keys.begin + key, head_kv), p.grad_v.width,
                      sums);
}

struct Case {
  const char* name;
  int64_t batch, tokens_q, tokens_k;
  int heads_kv, group, dim_k, dim_v;
  int stride, first_seen, window;  // window 0: none
  std::vector<int32_t> cu_q{}, cu_k{};
  bool poison = false;  // NaN in all rows of odd packed sequences, and in unused keys
  int padding = 0;      // elements between heads
  std::vector<int32_t> used{};
};

enum Extra { kGate, kGradLse, kNeither };

template <typename Element>
struct Problem {
  const Case c;
  int64_t keys;
  Device<Element> q, k, v, grad_out, grad_k, grad_v;
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
  int64_t rows() const { return c.batch * c.tokens_q * c.heads_kv * c.group; }

  Problem(const Case& of, Extra extra, bool exact)
      : c(of),
        keys(count_keys(of)),
        q(rows() * (c.dim_k + c.padding)),
        k(c.batch * keys * c.heads_kv * (c.dim_k + c.padding)),
        v(c.batch * keys * c.heads_kv * (c.dim_v + c.padding)),
        grad_out(rows() * (c.dim_v + c.padding)),
        grad_k(c.batch * keys * c.heads_kv * c.dim_k),
        grad_v(c.batch * keys * c.heads_kv * c.dim_v),
        lse(rows()),
        delta(rows()),
        gate(rows()),
        grad_lse(rows()),
        cu_q(c.cu_q.size()),
        cu_k(c.cu_k.size()),
        cu_cmp(c.cu_k.size()),
        used(c.used.size()) {
    fill_normal<<<1024, 256>>>(q.data, q.size, 1, 0.f, 1.f);
    fill_normal<<<1024, 256>>>(k.data, k.size, 2, 0.f, 1.f);
    fill_normal<<<1024, 256>>>(v.data, v.size, 3, 0.f, 1.f);
    fill_normal<<<1024, 256>>>(grad_out.data, grad_out.size, 4, 0.f, 1.f);
    fill_normal<<<1024, 256>>>(gate.data, gate.size, 5, 0.5f, 0.3f);
    fill_normal<<<1024, 256>>>(grad_lse.data, grad_lse.size, 6, 0.f, 1.f);
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
      const auto spoil = [&](Device<Element>& x, int64_t begin, int64_t end, int64_t row) {
        fill_value<<<64, 256>>>(x.data + begin * row, (end - begin) * row, nan);
      };
      for (size_t i = 0; i + 1 < cu.size(); ++i) {
        const int64_t begin = i % 2 == 1       ? cu[i]
                              : c.used.empty() ? cu[i + 1]
                                               : cu[i] + (c.stride == 1 ? c.used[i] : blocks(c, c.used[i]));
        spoil(k, begin, cu[i + 1], c.heads_kv * (c.dim_k + c.padding));
        spoil(v, begin, cu[i + 1], c.heads_kv * (c.dim_v + c.padding));
        if (i % 2 == 1) {
          spoil(q, c.cu_q[i], c.cu_q[i + 1], heads * (c.dim_k + c.padding));
          spoil(grad_out, c.cu_q[i], c.cu_q[i + 1], heads * (c.dim_v + c.padding));
        }
      }
    }
    const auto view = [&](void* data, int64_t length, int64_t all_heads, int width, int padding) {
      const int64_t head = width + padding;
      return TensorView{data, packed ? 0 : length * all_heads * head, all_heads * head, head, width};
    };
    const auto numbers = [&](float* data) { return RowView{data, packed ? 0 : heads * c.tokens_q, c.tokens_q}; };
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
    params.grad_out = view(grad_out.data, c.tokens_q, heads, c.dim_v, c.padding);
    params.grad_k = view(grad_k.data, keys, c.heads_kv, c.dim_k, 0);
    params.grad_v = view(grad_v.data, keys, c.heads_kv, c.dim_v, 0);
    params.lse = numbers(lse.data);
    params.delta = numbers(delta.data);
    params.gate = extra == kGate ? numbers(gate.data) : RowView{};
    params.grad_lse = extra == kGradLse ? numbers(grad_lse.data) : RowView{};
    params.num_keys = keys;
    fill_rows<Element><<<static_cast<unsigned>((rows() + kWarps - 1) / kWarps), 32 * kWarps>>>(params, rows(), exact);
    check_cuda(cudaDeviceSynchronize(), "rows");
  }

  double pairs() const {
    double sum = 0;
    for (int64_t t = 0; t < c.tokens_q; ++t) {
      const auto position = static_cast<int32_t>(c.tokens_k - c.tokens_q + t);
      sum += std::min<double>(params.visibility.end(position), keys) - params.visibility.begin(position);
    }
    return sum * c.batch * c.heads_kv * c.group;
  }
};

struct Kernel {
  const char* name;
  RangeSplits (*splits)(const RangeBackwardParams&, int);
  void (*launch)(const RangeBackwardParams&, cudaStream_t);
};

// As launch.cu chooses for the sm_80 kernel.
RangeSplits sm80_splits(const RangeBackwardParams& p, int processors) {
  const Sequences& s = p.sequences;
  const int64_t tiles = count_slots(s, p.num_keys, kKeysPerGradientTile) * s.heads_kv;
  int64_t queries = s.length_q;
  if (p.visibility.window != Visibility::kNoWindow) {
    queries = min_of(queries, int64_t{p.visibility.window} + kKeysPerGradientTile);
  }
  const int64_t rows = queries * s.group;
  const int64_t wanted = ceil_div(int64_t{16} * processors, max_of(tiles, 1));
  const int64_t rows_per_split = max_of(ceil_div(ceil_div(rows, wanted), 64) * 64, 1024);
  const int64_t splits = max_of(ceil_div(rows, rows_per_split), 1);
  return {static_cast<int32_t>(splits), static_cast<int32_t>(rows_per_split),
          splits > 1 ? tiles * splits * kKeysPerGradientTile * tile_row_size(p.q.width, p.v.width) : 0};
}

// Splits of very few rows.
RangeSplits many_splits(const RangeBackwardParams& p, int) {
  const Sequences& s = p.sequences;
  const int64_t rows = std::max<int64_t>(3 * 64 / s.group, s.length_q / 40) * s.group;
  const int64_t splits = ceil_div(s.length_q * s.group, rows);
  return {static_cast<int32_t>(splits), static_cast<int32_t>(rows),
          count_slots(s, p.num_keys, kKeysPerRangeTileSm90) * s.heads_kv * splits * kKeysPerRangeTileSm90 *
              tile_row_size(p.q.width, p.v.width)};
}

template <typename Element>
void run(Problem<Element>& problem, const Kernel& kernel, Device<float>& partials) {
  RangeBackwardParams p = problem.params;
  const RangeSplits splits = kernel.splits(p, multiprocessors("device"));
  p.splits = splits.splits;
  p.rows_per_split = splits.rows_per_split;
  p.partials = partials.data;
  if (splits.partial_floats > partials.size) {
    std::printf("too many partial sums: %lld\n", static_cast<long long>(splits.partial_floats));
    return;
  }
  kernel.launch(p, nullptr);
}

int wrong = 0;
int right = 0;
double largest_error = 0;

template <typename Element>
void check(Problem<Element>& problem, const Kernel& kernel, Device<float>& partials) {
  const Case& c = problem.c;
  if (!range_backward_keys_fits_sm90(problem.params)) {
    return;
  }
  const float nothing = c.cu_k.empty() ? std::numeric_limits<float>::quiet_NaN() : 0.f;
  fill_value<<<1024, 256>>>(problem.grad_k.data, problem.grad_k.size, nothing);
  fill_value<<<1024, 256>>>(problem.grad_v.data, problem.grad_v.size, nothing);
  fill_value<<<1024, 256>>>(partials.data, partials.size, std::numeric_limits<float>::quiet_NaN());
  run(problem, kernel, partials);
  Device<Sums> sums(1);
  sums.set({Sums{}});
  compare_keys<Element>
      <<<static_cast<unsigned>(count_slots(problem.params.sequences, problem.keys, 1) * c.heads_kv), 32 * kWarps>>>(
          problem.params, c.poison, sums.data);
  check_cuda(cudaDeviceSynchronize(), c.name);
  const std::vector<Element> first_k = problem.grad_k.get();
  const std::vector<Element> first_v = problem.grad_v.get();
  run(problem, kernel, partials);
  const bool same = std::memcmp(first_k.data(), problem.grad_k.get().data(), first_k.size() * sizeof(Element)) == 0 &&
                    std::memcmp(first_v.data(), problem.grad_v.get().data(), first_v.size() * sizeof(Element)) == 0;
  const Sums e = sums.get()[0];
  const double error_k = std::sqrt(e.error_k / (e.norm_k + 1e-30));
  const double error_v = std::sqrt(e.error_v / (e.norm_v + 1e-30));
  const double allowed = __is_same(Element, Half) ? 1e-3 : 8e-3;
  if (error_k < allowed && error_v < allowed && (same || c.poison)) {
    ++right;
    largest_error = std::max({largest_error, error_k, error_v});
    return;
  }
  if (++wrong < 16) {
    std::printf("%-20s %-10s WRONG dk %.1e dv %.1e%s\n", c.name, kernel.name, error_k, error_v,
                same ? "" : " and not twice the same");
    std::fflush(stdout);
  }
}

// In turns, so that a GPU that slows down as it warms up slows all of them.
template <typename Element>
void time_kernels(Problem<Element>& problem, const std::vector<Kernel>& kernels, Device<float>& partials) {
  constexpr int kWarmUps = 2;
  constexpr int kRepeats = 15;
  cudaEvent_t begin, end;
  cudaEventCreate(&begin);
  cudaEventCreate(&end);
  std::vector<std::vector<float>> times(kernels.size());
  std::vector<std::vector<Element>> results;
  for (int i = 0; i < kRepeats + kWarmUps; ++i) {
    for (size_t kernel = 0; kernel < kernels.size(); ++kernel) {
      if (i > 4 && std::string(kernels[kernel].name) == "sm80") {
        continue;
      }
      cudaEventRecord(begin);
      run(problem, kernels[kernel], partials);
      cudaEventRecord(end);
      check_cuda(cudaEventSynchronize(end), problem.c.name);
      float ms = 0.f;
      cudaEventElapsedTime(&ms, begin, end);
      if (i >= kWarmUps) {
        times[kernel].push_back(ms);
      } else if (i == 0) {
        results.push_back(problem.grad_k.get());
        results.push_back(problem.grad_v.get());
      }
    }
  }
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  const double flops = 4.0 * (problem.c.dim_k + problem.c.dim_v) * problem.pairs();
  std::printf("%s:", problem.c.name);
  for (size_t kernel = 0; kernel < kernels.size(); ++kernel) {
    std::sort(times[kernel].begin(), times[kernel].end());
    const float ms = times[kernel][times[kernel].size() / 2];
    double worst = 0;  // distance from the last kernel's results
    for (int of = 0; of < 2; ++of) {
      const auto& mine = results[2 * kernel + of];
      const auto& others = results[2 * kernels.size() - 2 + of];
      double error = 0;
      double norm = 0;
      for (size_t i = 0; i < mine.size(); ++i) {
        const double x = static_cast<float>(mine[i]);
        const double y = static_cast<float>(others[i]);
        error += (x - y) * (x - y);
        norm += y * y;
      }
      worst = std::max(worst, std::sqrt(error / norm));
    }
    std::printf("  %s %.3f (%.0f, %.0e)", kernels[kernel].name, ms, flops / ms * 1e-9, worst);
  }
  std::printf("\n");
  std::fflush(stdout);
}

#include "range_backward_keys_variants.h"

}  // namespace

int main(int argc, char** argv) {
  const std::string what = argc > 1 ? argv[1] : "all";
  if (what == "all" || what == "check") {
    run_checks();
  }
  if (what == "all" || what == "time") {
    run_times();
  }
  if (what == "profile") {
    run_profile();
  }
  return 0;
}
