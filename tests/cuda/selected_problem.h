// Problems for the tests of selected attention's Hopper kernels: tensors, lists of blocks, and the parameters.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "common/launch.cuh"
#include "common/matrix.cuh"
#include "device_data.h"
#include "selected/params.h"

namespace nsa_tests {

using namespace nsa;

constexpr int kMostSamples = 500;  // queries of a check: the plain kernels are slow

enum class Choice { kRandom, kCorrelated, kPopular, kHostile };

// How often a block is chosen where some are more popular than others: an eighth never, the rest 1 to 32 times as
// often.
inline float popularity(int block) {
  const uint32_t hash = static_cast<uint32_t>(block) * 2654435761u;
  return hash >> 29 == 0 ? 0.f : std::exp2(-5.f * static_cast<float>(hash >> 8 & 0xffff) / 65536.f);
}

struct Case {
  const char* name;
  int batch, tq, tk, heads_kv, group, dk, dv, n;
  Choice choice = Choice::kRandom;
  float scale_sign = 1.f;
  std::vector<int32_t> cu_q = {};
  std::vector<int32_t> cu_k = {};
  std::vector<int32_t> used_k = {};
};

// Lists of one sequence: block 0, the last two, and free ones, ascending, -1 last. Hostile ones hold anything.
inline void make_lists(int32_t* to, const Case& c, int length_q, int length_k, Random& random) {
  constexpr int kSize = 64;
  for (int h = 0; h < c.heads_kv; ++h) {
    std::vector<int32_t> free;
    for (int i = 0; i < length_q; ++i) {
      int32_t* list = to + (int64_t{i} * c.heads_kv + h) * c.n;
      std::fill(list, list + c.n, -1);
      const int position = length_k - length_q + i;
      if (c.choice == Choice::kHostile) {
        for (int j = 0; j < c.n; ++j) {
          list[j] = random.chance(0.2f) ? -1 : static_cast<int32_t>(random.below(length_k / kSize + 3));
        }
        continue;
      }
      if (position < 0) {
        continue;
      }
      const int own = position / kSize;
      std::vector<int32_t> chosen;
      for (int block : {0, own - 1, own}) {
        if (block >= 0 && std::find(chosen.begin(), chosen.end(), block) == chosen.end()) {
          chosen.push_back(block);
        }
      }
      const int available = std::max(own - 2, 0);  // blocks 1 .. own - 2
      const int wanted = std::min(available, c.n - 3);
      if (c.choice == Choice::kCorrelated) {
        std::erase_if(free, [&](int32_t) { return !random.chance(0.7f); });
      } else {
        free.clear();
      }
      for (int tries = 0; static_cast<int>(free.size()) < wanted; ++tries) {
        const int32_t block = 1 + static_cast<int32_t>(random.below(available));
        if (c.choice == Choice::kPopular && tries < 1000 && !random.chance(popularity(block))) {
          continue;
        }
        if (std::find(free.begin(), free.end(), block) == free.end()) {
          free.push_back(block);
        }
      }
      chosen.insert(chosen.end(), free.begin(), free.end());
      std::sort(chosen.begin(), chosen.end());
      std::copy(chosen.begin(), chosen.end(), list);
    }
  }
}

template <typename Element>
struct Problem {
  Case c;
  bool packed;
  int64_t tokens_q, tokens_k;  // of all sequences
  int heads;
  Device<Element> q, k, v, out;
  Device<float> lse;
  Device<int32_t> lists, cu_q, cu_k, used_k;
  SelectedForwardParams p{};

  explicit Problem(const Case& case_)
      : c(case_),
        packed(!c.cu_q.empty()),
        tokens_q(packed ? c.cu_q.back() : int64_t{c.batch} * c.tq),
        tokens_k(packed ? c.cu_k.back() : int64_t{c.batch} * c.tk),
        heads(c.heads_kv * c.group),
        q(tokens_q * heads * c.dk),
        k(tokens_k * c.heads_kv * c.dk),
        v(tokens_k * c.heads_kv * c.dv),
        out(tokens_q * heads * c.dv),
        lse(tokens_q * heads),
        lists(tokens_q * c.heads_kv * c.n),
        cu_q(c.cu_q.size()),
        cu_k(c.cu_k.size()),
        used_k(c.used_k.size()) {
    fill_normal<<<1024, 256>>>(q.data, q.size, 1);
    fill_normal<<<1024, 256>>>(k.data, k.size, 2);
    fill_normal<<<1024, 256>>>(v.data, v.size, 3);
    Random random{uint64_t{12345} + c.n};
    std::vector<int32_t> all(lists.size);
    const int sequences = packed ? static_cast<int>(c.cu_q.size()) - 1 : c.batch;
    for (int b = 0; b < sequences; ++b) {
      const int64_t begin = packed ? c.cu_q[b] : int64_t{b} * c.tq;
      const int length_q = packed ? c.cu_q[b + 1] - c.cu_q[b] : c.tq;
      const int length_k = !packed ? c.tk : c.used_k.empty() ? c.cu_k[b + 1] - c.cu_k[b] : c.used_k[b];
      make_lists(all.data() + begin * c.heads_kv * c.n, c, length_q, length_k, random);
      if (!c.used_k.empty()) {  // what lies in unused slots is nobody's
        const int64_t first = c.cu_k[b] + c.used_k[b];
        const int64_t unused = c.cu_k[b + 1] - first;
        check_cuda(cudaMemset(k.data + first * c.heads_kv * c.dk, 0xff, unused * c.heads_kv * c.dk * 2), "memset");
        check_cuda(cudaMemset(v.data + first * c.heads_kv * c.dv, 0xff, unused * c.heads_kv * c.dv * 2), "memset");
      }
    }
    lists.set(all);
    cu_q.set(c.cu_q);
    cu_k.set(c.cu_k);
    used_k.set(c.used_k);
    Sequences& s = p.sequences;
    s.batch = sequences;
    s.heads_kv = c.heads_kv;
    s.group = c.group;
    s.by_group = Divisor(c.group);
    s.length_q = packed ? tokens_q : c.tq;
    s.length_k = packed ? tokens_k : c.tk;
    s.cumulative_q = packed ? cu_q.data : nullptr;
    s.cumulative_k = packed ? cu_k.data : nullptr;
    s.used_k = c.used_k.empty() ? nullptr : used_k.data;
    p.scale = c.scale_sign / std::sqrt(static_cast<float>(c.dk));
    p.select_size = 64;
    p.num_selected = c.n;
    p.block_indices = lists.data;
    const auto view = [&](Element* data, int length, int h, int d) {
      return TensorView{data, packed ? 0 : int64_t{length} * h * d, int64_t{h} * d, d, d};
    };
    p.q = view(q.data, c.tq, heads, c.dk);
    p.k = view(k.data, c.tk, c.heads_kv, c.dk);
    p.v = view(v.data, c.tk, c.heads_kv, c.dv);
    p.out = view(out.data, c.tq, heads, c.dv);
    p.lse = packed ? RowView{lse.data, 0, tokens_q} : RowView{lse.data, int64_t{heads} * c.tq, c.tq};
  }
};

template <typename Launch>
inline double median_ms(const Launch& launch, int times) {
  cudaEvent_t begin, end;
  cudaEventCreate(&begin);
  cudaEventCreate(&end);
  for (int i = 0; i < 3; ++i) {
    launch();
  }
  std::vector<float> all;
  for (int i = 0; i < times; ++i) {
    cudaEventRecord(begin);
    launch();
    cudaEventRecord(end);
    check_cuda(cudaEventSynchronize(end), "time");
    float ms = 0;
    cudaEventElapsedTime(&ms, begin, end);
    all.push_back(ms);
  }
  std::sort(all.begin(), all.end());
  return all[all.size() / 2];
}

}  // namespace nsa_tests
