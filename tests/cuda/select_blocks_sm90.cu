// The choice of blocks by Hopper's kernel against a float64 one, and its time beside the sm_80 kernel's. No torch:
//   nvcc -std=c++20 -O3 -I csrc -DNSA_BOUNDED_WAITS -gencode=arch=compute_90a,code=sm_90a \
//     tests/cuda/select_blocks_sm90.cu csrc/selection/instantiations/select_*.cu -o select_blocks_sm90
//   ./select_blocks_sm90 [check | time [cases whose names hold this]]
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "common/dispatch.h"
#include "device_data.h"
#include "selection/launch_sm80.cuh"
#include "selection/launch_sm90.cuh"

namespace nsa {
extern template void launch_select_blocks_sm80<Half, 64>(const SelectBlocksParams&, cudaStream_t);
extern template void launch_select_blocks_sm80<Half, 128>(const SelectBlocksParams&, cudaStream_t);
extern template void launch_select_blocks_sm80<Half, 192>(const SelectBlocksParams&, cudaStream_t);
extern template void launch_select_blocks_sm80<BFloat16, 64>(const SelectBlocksParams&, cudaStream_t);
extern template void launch_select_blocks_sm80<BFloat16, 128>(const SelectBlocksParams&, cudaStream_t);
extern template void launch_select_blocks_sm80<BFloat16, 192>(const SelectBlocksParams&, cudaStream_t);
extern template bool try_select_blocks_sm90<Half, 64>(const SelectBlocksParams&, cudaStream_t);
extern template bool try_select_blocks_sm90<Half, 128>(const SelectBlocksParams&, cudaStream_t);
extern template bool try_select_blocks_sm90<Half, 192>(const SelectBlocksParams&, cudaStream_t);
extern template bool try_select_blocks_sm90<BFloat16, 64>(const SelectBlocksParams&, cudaStream_t);
extern template bool try_select_blocks_sm90<BFloat16, 128>(const SelectBlocksParams&, cudaStream_t);
extern template bool try_select_blocks_sm90<BFloat16, 192>(const SelectBlocksParams&, cudaStream_t);
}  // namespace nsa

using namespace nsa;

namespace {

// One thread a (query of the batch, head): the lse of its visible keys. `rough`: about that, for data without meaning.
template <typename Element>
__global__ void fill_lse(const __grid_constant__ SelectBlocksParams p, int64_t tokens, bool rough) {
  const Sequences& s = p.sequences;
  const int heads = s.heads_kv * s.group;
  const int64_t row = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  if (row >= tokens * heads) {
    return;
  }
  const int head = static_cast<int>(row % heads);
  const Tile at = find_query(s, row / heads);
  const SequencePlace place = place_of(s, at.sequence);
  const int visible = visible_keys(p, place.offset + at.index);
  float& lse = p.lse.at(place.batch, head, place.q_begin + at.index);
  if (rough) {
    lse = visible > 0 ? logf(static_cast<float>(visible)) + 0.5f : kMinusInfinity;
    return;
  }
  const Element* q = p.q.row<Element>(place.batch, place.q_begin + at.index, head);
  double sum = 0;
  for (int m = 0; m < visible; ++m) {
    const Element* k = p.k.row<Element>(place.batch, place.cmp_begin + m, head / s.group);
    float score = 0.f;
    for (int d = 0; d < p.q.width; ++d) {
      score += to_float(q[d]) * to_float(k[d]);
    }
    sum += exp(double{score} * p.scale);
  }
  lse = static_cast<float>(log(sum));
}

struct Verdict {
  unsigned long long invalid;
  unsigned long long different;  // from the other lists
  float gap;                     // the worst, relative to the row's highest importance
  unsigned long long where;
};

// One block of threads a list: its form, and by how much it left out a better block.
template <typename Element>
__global__ void judge(const __grid_constant__ SelectBlocksParams p, const int32_t* other, int64_t step,
                      Verdict* verdict) {
  extern __shared__ double numbers[];
  const Sequences& s = p.sequences;
  const int64_t list_number = blockIdx.x * step;
  const int head_kv = static_cast<int>(list_number % s.heads_kv);
  const Tile at = find_query(s, list_number / s.heads_kv);
  const SequencePlace place = place_of(s, at.sequence);
  const int position = place.offset + at.index;
  const int visible = visible_keys(p, position);
  const int own = own_block_of(position, p.select_size);
  double* const importance = numbers + visible;
  for (int m = threadIdx.x; m < visible; m += blockDim.x) {
    const Element* k = p.k.row<Element>(place.batch, place.cmp_begin + m, head_kv);
    double sum = 0;
    for (int g = 0; g < s.group; ++g) {
      const int head = head_kv * s.group + g;
      const Element* q = p.q.row<Element>(place.batch, place.q_begin + at.index, head);
      double score = 0;
      for (int d = 0; d < p.q.width; ++d) {
        score += double{to_float(q[d])} * to_float(k[d]);
      }
      sum += exp(score * p.scale - p.lse.at(place.batch, head, place.q_begin + at.index));
    }
    numbers[m] = sum;
  }
  __syncthreads();
  const BlockOverlap overlap{p.block_size / p.block_stride, p.select_size / p.block_stride};
  for (int j = threadIdx.x; j <= own; j += blockDim.x) {
    double sum = 0;
    for (int64_t m = overlap.first(j); m < min_of(overlap.end(j), visible); ++m) {
      sum += numbers[m] * static_cast<double>(overlap.count(m, j));
    }
    importance[j] = sum;
  }
  __syncthreads();
  if (threadIdx.x != 0) {
    return;
  }
  const int32_t* list = p.block_indices + list_number * p.num_selected;
  bool valid = true;
  bool same = true;
  double worst = 1e300;
  double highest = 0;
  double left_out = -1;
  int chosen = 0;
  for (int j = 0; j <= own; ++j) {
    const bool listed = chosen < p.num_selected && list[chosen] == j;
    chosen += listed;
    highest = fmax(highest, importance[j]);
    if (p.forced.contains(j, own)) {
      valid = valid && listed;
    } else if (listed) {
      worst = fmin(worst, importance[j]);
    } else {
      left_out = fmax(left_out, importance[j]);
    }
  }
  valid = valid && chosen == min(p.num_selected, own + 1);  // also: ascending, selectable
  for (int i = 0; i < p.num_selected; ++i) {
    valid = valid && (i < chosen || list[i] == -1);
    same = same && list[i] == other[list_number * p.num_selected + i];
  }
  const float gap = highest > 0 ? static_cast<float>((left_out - worst) / highest) : 0.f;
  if (!valid && atomicAdd(&verdict->invalid, 1ull) == 0) {
    verdict->where = list_number;
  }
  if (!same) {
    atomicAdd(&verdict->different, 1ull);
  }
  if (gap > 0.f) {
    atomicMax(reinterpret_cast<int*>(&verdict->gap), __float_as_int(gap));
  }
}

struct Case {
  const char* name;
  int batch, tq, tk, heads_kv, group, dim, n;
  int block_size = 32, block_stride = 16, select_size = 64, initial = 1, local = 2;
  float scale_sign = 1.f;
  std::vector<int32_t> cu_q = {};
  std::vector<int32_t> cu_k = {};
  std::vector<int32_t> used_k = {};
  bool falls_back = false;  // to the sm_80 kernel
};

template <typename Element>
struct Problem {
  Case c;
  bool packed;
  int sequences, heads;
  int64_t tokens, keys;  // of all sequences
  std::vector<int32_t> cumulative;
  Device<Element> q, k;
  Device<float> lse;
  Device<int32_t> lists, portable, cu_q, cu_k, used_k, cu_cmp;
  SelectBlocksParams p{};

  static std::vector<int32_t> count_keys(const Case& c) {
    std::vector<int32_t> sums{0};
    for (int b = 0; b < (c.cu_q.empty() ? c.batch : static_cast<int>(c.cu_k.size()) - 1); ++b) {
      const int length = c.cu_q.empty() ? c.tk : c.cu_k[b + 1] - c.cu_k[b];
      sums.push_back(sums.back() + static_cast<int32_t>(num_compressed_blocks(length, c.block_size, c.block_stride)));
    }
    return sums;
  }

  Problem(const Case& case_, bool rough)
      : c(case_),
        packed(!c.cu_q.empty()),
        sequences(packed ? static_cast<int>(c.cu_q.size()) - 1 : c.batch),
        heads(c.heads_kv * c.group),
        tokens(packed ? c.cu_q.back() : int64_t{c.batch} * c.tq),
        cumulative(count_keys(c)),
        q(tokens * heads * c.dim),
        k(int64_t{cumulative.back()} * c.heads_kv * c.dim),
        lse(tokens * heads),
        lists(tokens * c.heads_kv * c.n),
        portable(lists.size),
        cu_q(c.cu_q.size()),
        cu_k(c.cu_k.size()),
        used_k(c.used_k.size()),
        cu_cmp(cumulative.size()) {
    keys = cumulative.back();
    fill_normal<<<1024, 256>>>(q.data, q.size, 1);
    fill_normal<<<1024, 256>>>(k.data, k.size, 2);
    for (size_t b = 0; b < c.used_k.size(); ++b) {  // what lies in unused slots is nobody's
      const int64_t used = num_compressed_blocks(c.used_k[b], c.block_size, c.block_stride);
      const int64_t first = cumulative[b] + used;
      check_cuda(cudaMemset(k.data + first * c.heads_kv * c.dim, 0xff,
                            (cumulative[b + 1] - first) * c.heads_kv * c.dim * sizeof(Element)),
                 "memset");
    }
    cu_q.set(c.cu_q);
    cu_k.set(c.cu_k);
    used_k.set(c.used_k);
    cu_cmp.set(cumulative);
    Sequences& s = p.sequences;
    s.batch = sequences;
    s.heads_kv = c.heads_kv;
    s.group = c.group;
    s.by_group = Divisor(c.group);
    s.length_q = packed ? tokens : c.tq;
    s.length_k = packed ? c.cu_k.back() : c.tk;
    s.cumulative_q = packed ? cu_q.data : nullptr;
    s.cumulative_k = packed ? cu_k.data : nullptr;
    s.cumulative_cmp = packed ? cu_cmp.data : nullptr;
    s.used_k = c.used_k.empty() ? nullptr : used_k.data;
    p.scale = c.scale_sign / std::sqrt(static_cast<float>(c.dim));
    p.block_size = c.block_size;
    p.block_stride = c.block_stride;
    p.select_size = c.select_size;
    p.num_selected = c.n;
    p.forced = {c.initial, c.local};
    const int64_t rows = packed ? keys : cumulative[1];
    p.q = {q.data, packed ? 0 : int64_t{c.tq} * heads * c.dim, int64_t{heads} * c.dim, c.dim, c.dim};
    p.k = {k.data, packed ? 0 : rows * c.heads_kv * c.dim, int64_t{c.heads_kv} * c.dim, c.dim, c.dim};
    p.lse = packed ? RowView{lse.data, 0, tokens} : RowView{lse.data, int64_t{heads} * c.tq, c.tq};
    p.num_keys = rows;
    p.block_indices = lists.data;
    fill_lse<Element><<<static_cast<unsigned>(ceil_div(tokens * heads, 128)), 128>>>(p, tokens, rough);
    check_cuda(cudaDeviceSynchronize(), "data");
  }

  bool launch90() {
    bool ran = false;
    with_tile_dims(c.dim, 0, [&](auto dim, auto) {
      if constexpr (dim <= 192) {
        ran = try_select_blocks_sm90<Element, dim>(p, nullptr);
      }
    });
    return ran;
  }
  void launch80() {
    SelectBlocksParams to = p;
    to.block_indices = portable.data;
    with_tile_dims(c.dim, 0, [&](auto dim, auto) {
      if constexpr (dim <= 192) {
        launch_select_blocks_sm80<Element, dim>(to, nullptr);
      }
    });
  }
  int64_t most_keys() const {
    int64_t most = 0;
    for (size_t b = 1; b < cumulative.size(); ++b) {
      most = std::max<int64_t>(most, cumulative[b] - cumulative[b - 1]);
    }
    return most;
  }
};

template <typename Element>
bool check_case(Problem<Element>& x, const char* type, int64_t samples) {
  check_cuda(cudaMemset(x.lists.data, 0x55, x.lists.size * sizeof(int32_t)), "memset");
  const bool ran = x.launch90();
  check_cuda(cudaDeviceSynchronize(), x.c.name);
  if (!ran) {
    std::printf("%-4s %-26s %s runs on the sm_80 kernel\n", x.c.falls_back ? "ok" : "BAD", x.c.name, type);
    return x.c.falls_back;
  }
  x.launch80();
  Device<Verdict> verdict(1);
  check_cuda(cudaMemset(verdict.data, 0, sizeof(Verdict)), "memset");
  const int64_t all = x.tokens * x.c.heads_kv;
  const int64_t step = std::max<int64_t>(all / samples, 1) | 1;
  const int64_t own = (x.most_keys() + 2) * x.c.block_stride / x.c.select_size + 64;
  const int64_t shared = (x.most_keys() + own) * static_cast<int64_t>(sizeof(double));
  check_cuda(cudaFuncSetAttribute(judge<Element>, cudaFuncAttributeMaxDynamicSharedMemorySize, 200 * 1024), "judge");
  judge<Element><<<static_cast<unsigned>(ceil_div(all, step)), 128, shared>>>(x.p, x.portable.data, step, verdict.data);
  Verdict result{};
  check_cuda(cudaMemcpy(&result, verdict.data, sizeof(Verdict), cudaMemcpyDeviceToHost), "judge");
  const bool good = !x.c.falls_back && result.invalid == 0 && result.gap < 2e-5f;
  std::printf("%-4s %-26s %s lists %lld, invalid %llu (%llu), other than sm_80's %llu, gap %.1e\n", good ? "ok" : "BAD",
              x.c.name, type, static_cast<long long>(ceil_div(all, step)), result.invalid, result.where,
              result.different, result.gap);
  std::fflush(stdout);
  return good;
}

std::vector<Case> cases() {
  return {
      {"paper 4k", 1, 4096, 4096, 2, 16, 128, 16},
      {"group 8", 2, 1531, 1531, 2, 8, 128, 16},
      {"group 4", 2, 1531, 1531, 2, 4, 128, 16},
      {"dim 64", 1, 2047, 2047, 2, 16, 64, 16},
      {"dim 192", 1, 2047, 2047, 2, 16, 192, 16},
      {"dim 192, group 8", 1, 997, 997, 2, 8, 192, 16},
      {"dim 192, group 4", 1, 997, 997, 2, 4, 192, 16},
      {"dim 96", 1, 997, 997, 1, 16, 96, 16},
      {"dim 40, group 4", 1, 997, 997, 2, 4, 40, 16},
      {"group 1", 1, 997, 997, 3, 1, 128, 16},
      {"group 3", 1, 997, 997, 2, 3, 128, 16},
      {"group 6", 1, 997, 997, 2, 6, 128, 16},
      {"group 12", 1, 997, 997, 2, 12, 128, 16},
      {"group 32", 1, 997, 997, 2, 32, 128, 16},
      {"group 40", 1, 997, 997, 1, 40, 128, 16},
      {"group 64", 1, 997, 997, 1, 64, 128, 16},
      {"group 128", 1, 497, 497, 1, 128, 128, 16},
      {"n 17", 1, 4001, 4001, 1, 16, 128, 17},
      {"n 32", 1, 9001, 9001, 2, 16, 128, 32},
      {"n 33", 1, 4001, 4001, 1, 16, 128, 33},
      {"n 64", 1, 9001, 9001, 2, 16, 128, 64},
      {"n 32, group 8", 1, 4001, 4001, 2, 8, 128, 32},
      {"n 64, group 8", 1, 9001, 9001, 1, 8, 128, 64},
      {"n 64, group 4", 1, 9001, 9001, 1, 4, 128, 64},
      {"n 29, group 40", 1, 2997, 2997, 1, 40, 128, 29},
      {"n 32, dim 64", 1, 4001, 4001, 2, 16, 64, 32},
      {"n 64, dim 64, group 4", 1, 4001, 4001, 1, 4, 64, 64},
      {"n 64, dim 192", 1, 5001, 5001, 1, 16, 192, 64},
      {"n 64, dim 192, group 8", 1, 5001, 5001, 1, 8, 192, 64},
      {"n 32, dim 192, group 4", 1, 4001, 4001, 1, 4, 192, 32},
      {"n 33, dim 192, group 4", 1, 4001, 4001, 1, 4, 192, 33, 32, 16, 64, 1, 2, 1.f, {}, {}, {}, true},
      {"n 64, none forced", 1, 8001, 8001, 1, 16, 128, 64, 32, 16, 64, 0, 0},
      {"n 32, 30 forced", 1, 4001, 4001, 1, 16, 128, 32, 32, 16, 64, 20, 10},
      {"n 48, all forced", 1, 4001, 4001, 1, 16, 128, 48, 32, 16, 64, 40, 8},
      {"n 64, l 32 d 8 l' 24", 1, 5001, 5001, 1, 16, 128, 64, 32, 8, 24},
      {"long, several walks", 1, 9001, 9001, 3, 16, 128, 16},
      {"long, group 8", 1, 9001, 9001, 4, 8, 128, 16},
      {"long, group 4", 1, 9001, 9001, 6, 4, 128, 16},
      {"long, dim 192", 1, 9001, 9001, 2, 16, 192, 16},
      {"long, l 32 d 8 l' 24", 1, 5001, 5001, 3, 16, 128, 16, 32, 8, 24},
      {"5 of 16 forced", 1, 8001, 8001, 1, 16, 128, 16, 32, 16, 64, 2, 3},
      {"n 32, group 4", 1, 4001, 4001, 1, 4, 128, 32},
      {"n 2", 1, 997, 997, 1, 16, 128, 2, 32, 16, 64, 1, 1},
      {"n 3, all forced", 1, 997, 997, 1, 16, 128, 3},
      {"none forced", 1, 997, 997, 1, 16, 128, 16, 32, 16, 64, 0, 0},
      {"l 16 d 16 l' 64", 1, 997, 997, 1, 16, 128, 16, 16, 16, 64},
      {"l 64 d 16 l' 64", 1, 997, 997, 1, 16, 128, 16, 64, 16, 64},
      {"l 32 d 8 l' 64", 1, 997, 997, 1, 16, 128, 16, 32, 8, 64},
      {"l 32 d 16 l' 48", 1, 997, 997, 1, 16, 128, 16, 32, 16, 48},
      {"l 16 d 16 l' 16", 1, 997, 997, 1, 16, 128, 16, 16, 16, 16},
      {"l 64 d 1 l' 64", 1, 497, 497, 1, 16, 128, 6, 64, 1, 64},
      {"chunk", 2, 300, 3111, 2, 16, 128, 16},
      {"one query", 3, 1, 5003, 4, 16, 128, 16},
      {"shorter than l", 2, 31, 31, 2, 16, 128, 16, 32, 16, 64, 1, 2, 1.f, {}, {}, {}, true},
      {"one key", 2, 33, 33, 2, 16, 128, 16},
      {"negative scale", 1, 997, 997, 1, 16, 128, 16, 32, 16, 64, 1, 2, -1.f},
      {"packed", 1, 0, 0, 2, 16, 128, 16, 32, 16, 64, 1, 2, 1.f, {0, 781, 781, 788, 2048}, {0, 781, 781, 813, 2100}},
      {"packed, unused NaN",
       1,
       0,
       0,
       2,
       16,
       128,
       16,
       32,
       16,
       64,
       1,
       2,
       1.f,
       {0, 300, 301, 320, 900},
       {0, 900, 1500, 2000, 3000},
       {781, 40, 20, 999}},
      {"packed, n 64", 1, 0, 0, 2, 16, 128, 64, 32, 16, 64, 1, 2, 1.f, {0, 781, 788, 7048}, {0, 781, 813, 7100}},
      {"packed, group 4", 1, 0, 0, 2, 4, 128, 16, 32, 16, 64, 1, 2, 1.f, {0, 781, 788, 2048}, {0, 781, 813, 2100}},
  };
}

template <typename Element>
int check_all(const char* type) {
  int bad = 0;
  for (const Case& c : cases()) {
    Problem<Element> x(c, false);
    bad += !check_case(x, type, 6000);
  }
  return bad;
}

struct Contender {
  const char* name;
  bool (*run)(const SelectBlocksParams&);
  std::vector<float> times = {};
};

template <int kDim>
std::vector<Contender> both_kernels() {
  return {{"sm_80",
           [](const SelectBlocksParams& p) {
             launch_select_blocks_sm80<BFloat16, kDim>(p, nullptr);
             return true;
           }},
          {"sm_90a", [](const SelectBlocksParams& p) { return try_select_blocks_sm90<BFloat16, kDim>(p, nullptr); }}};
}

void time_case(const Case& c, std::vector<Contender> contenders) {
  Problem<BFloat16> x(c, true);
  double pairs = 0;
  for (int b = 0; b < x.sequences; ++b) {
    const int tq = x.packed ? c.cu_q[b + 1] - c.cu_q[b] : c.tq;
    const int tk = x.packed ? c.cu_k[b + 1] - c.cu_k[b] : c.tk;
    for (int i = 0; i < tq; ++i) {
      pairs += static_cast<double>(num_compressed_blocks(tk - tq + i + 1, 32, 16)) * c.heads_kv * c.group;
    }
  }
  cudaEvent_t begin;
  cudaEvent_t end;
  check_cuda(cudaEventCreate(&begin), "event");
  check_cuda(cudaEventCreate(&end), "event");
  const int rounds = x.tokens > 100000 ? 5 : x.tokens > 20000 ? 11 : 21;
  for (int round = -2; round < rounds; ++round) {
    for (Contender& one : contenders) {
      check_cuda(cudaEventRecord(begin), "event");
      const bool ran = one.run(x.p);
      check_cuda(cudaEventRecord(end), "event");
      check_cuda(cudaEventSynchronize(end), one.name);
      float ms = 0.f;
      check_cuda(cudaEventElapsedTime(&ms, begin, end), "event");
      if (round >= 0) {
        one.times.push_back(ran ? ms : -1.f);
      }
    }
  }
  std::printf("%-24s", c.name);
  for (Contender& one : contenders) {
    std::sort(one.times.begin(), one.times.end());
    const float ms = one.times[one.times.size() / 2];
    std::printf(" | %s %.3f (%.0f)", one.name, ms, pairs * 2 * c.dim / ms * 1e-9);
  }
  std::printf("\n");
  std::fflush(stdout);
}

}  // namespace

int main(int argc, char** argv) {
  const std::string what = argc > 1 ? argv[1] : "";
  int bad = 0;
  if (what != "time") {
    bad += check_all<BFloat16>("bf16");
    bad += check_all<Half>("fp16");
    std::printf("%d bad\n", bad);
  }
  if (what != "check") {
    std::printf("ms (TFLOP/s of visible pairs)\n");
    const std::string which = argc > 2 ? argv[2] : "";
    const auto time_if = [&]<int kDim>(std::integral_constant<int, kDim>, const Case& c) {
      if (std::string(c.name).find(which) != std::string::npos) {
        time_case(c, both_kernels<kDim>());
      }
    };
    time_if(std::integral_constant<int, 128>(), Case{"8k", 1, 8192, 8192, 4, 16, 128, 16});
    time_if(std::integral_constant<int, 128>(), Case{"16k", 1, 16384, 16384, 4, 16, 128, 16});
    time_if(std::integral_constant<int, 128>(), Case{"32k", 1, 32768, 32768, 4, 16, 128, 16});
    time_if(std::integral_constant<int, 128>(), Case{"64k", 1, 65536, 65536, 4, 16, 128, 16});
    time_if(std::integral_constant<int, 128>(), Case{"128k", 1, 131072, 131072, 4, 16, 128, 16});
    time_if(std::integral_constant<int, 128>(), Case{"32k, group 8", 1, 32768, 32768, 8, 8, 128, 16});
    time_if(std::integral_constant<int, 128>(), Case{"32k, group 4", 1, 32768, 32768, 16, 4, 128, 16});
    time_if(std::integral_constant<int, 128>(), Case{"32k, group 32", 1, 32768, 32768, 2, 32, 128, 16});
    time_if(std::integral_constant<int, 64>(), Case{"32k, dim 64", 1, 32768, 32768, 4, 16, 64, 16});
    time_if(std::integral_constant<int, 192>(), Case{"32k, dim 192", 1, 32768, 32768, 4, 16, 192, 16});
    time_if(std::integral_constant<int, 192>(), Case{"32k, dim 192, group 8", 1, 32768, 32768, 8, 8, 192, 16});
    time_if(std::integral_constant<int, 128>(), Case{"8 of 8k", 8, 8192, 8192, 4, 16, 128, 16});
    Case packed{"packed, 8 of 8k", 1, 0, 0, 4, 16, 128, 16};
    for (int i = 0; i <= 8; ++i) {
      packed.cu_q.push_back(8192 * i);
    }
    packed.cu_k = packed.cu_q;
    time_if(std::integral_constant<int, 128>(), packed);
    packed.name = "packed, one of 64k";
    packed.cu_q = packed.cu_k = {0, 65536};
    time_if(std::integral_constant<int, 128>(), packed);
    packed.name = "packed, 8 of 8k, n 32";
    packed.n = 32;
    packed.cu_q.clear();
    for (int i = 0; i <= 8; ++i) {
      packed.cu_q.push_back(8192 * i);
    }
    packed.cu_k = packed.cu_q;
    time_if(std::integral_constant<int, 128>(), packed);
    for (const int n : {16, 32, 64}) {
      for (const int group : {16, 8, 4}) {
        const std::string name = "lists of " + std::to_string(n) + ", group " + std::to_string(group) + ", 64k";
        time_if(std::integral_constant<int, 128>(), Case{name.c_str(), 1, 65536, 65536, 64 / group, group, 128, n});
      }
    }
    time_if(std::integral_constant<int, 128>(), Case{"one query, 64k", 8, 1, 65536, 4, 16, 128, 16});
  }
  return bad != 0;
}
