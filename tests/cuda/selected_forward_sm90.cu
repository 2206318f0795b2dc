// Selected attention's Hopper kernel against a plain float64 one, and its time beside the sm_80 kernel's. No torch:
//   nvcc -std=c++20 -O3 -I csrc -DNSA_BOUNDED_WAITS -gencode=arch=compute_90a,code=sm_90a \
//     tests/cuda/selected_forward_sm90.cu -o selected_forward_sm90
//   ./selected_forward_sm90 [check | time]
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "selected/launch_sm80.cuh"
#include "selected/launch_sm90.cuh"

using namespace nsa;

namespace {

struct Random {
  uint64_t state;
  uint32_t operator()() {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    return static_cast<uint32_t>(state >> 32) ^ static_cast<uint32_t>(state >> 61);
  }
  uint32_t below(uint32_t n) { return static_cast<uint32_t>((uint64_t{(*this)()} * n) >> 32); }
  bool chance(float p) { return (*this)() < p * 4294967296.0; }
};

template <typename T>
struct Device {
  T* data = nullptr;
  int64_t size = 0;
  explicit Device(int64_t n) : size(n) { check_cuda(cudaMalloc(&data, std::max<int64_t>(n, 1) * sizeof(T)), "malloc"); }
  Device(const Device&) = delete;
  ~Device() { cudaFree(data); }
  void set(const std::vector<T>& from) {
    check_cuda(cudaMemcpy(data, from.data(), from.size() * sizeof(T), cudaMemcpyHostToDevice), "copy");
  }
  std::vector<T> get() const {
    std::vector<T> to(size);
    check_cuda(cudaMemcpy(to.data(), data, size * sizeof(T), cudaMemcpyDeviceToHost), "copy");
    return to;
  }
};

// About normal: the sum of four uniform numbers.
template <typename Element>
__global__ void fill_normal(Element* to, int64_t count, uint64_t seed) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < count; i += int64_t{gridDim.x} * blockDim.x) {
    uint64_t x = (i + seed * 0x9e3779b97f4a7c15ull) * 0xbf58476d1ce4e5b9ull;
    x ^= x >> 31;
    x *= 0x94d049bb133111ebull;
    x ^= x >> 29;
    float sum = 0.f;
    for (int j = 0; j < 4; ++j) {
      sum += static_cast<float>((x >> (16 * j)) & 0xffff) / 65536.f - 0.5f;
    }
    to[i] = from_float<Element>(sum * 1.7320508f);
  }
}

// One block of threads per (sampled query of the batch, head).
template <typename Element>
__global__ void plain_forward(SelectedForwardParams p, const int32_t* sample, float* out, float* lse) {
  extern __shared__ double scores[];
  const int heads = p.sequences.heads_kv * p.sequences.group;
  const int64_t token = sample[blockIdx.x / heads];
  const int head = static_cast<int>(blockIdx.x % heads);
  const int head_kv = head / p.sequences.group;
  const Tile at = find_query(p.sequences, token);
  const SequencePlace place = place_of(p.sequences, at.sequence);
  const int limit = min(place.offset + at.index + 1, place.k_length);
  const int32_t* list = p.block_indices + (token * p.sequences.heads_kv + head_kv) * p.num_selected;
  const int keys = p.num_selected * p.select_size;
  const auto key_of = [&](int i) -> int64_t {
    const int block = list[i / p.select_size];
    const int64_t key = block < 0 ? limit : int64_t{block} * p.select_size + i % p.select_size;
    return key < limit ? key : -1;
  };
  const Element* q = p.q.row<Element>(place.batch, place.q_begin + at.index, head);
  for (int i = threadIdx.x; i < keys; i += blockDim.x) {
    const int64_t key = key_of(i);
    double score = kMinusInfinity;
    if (key >= 0) {
      const Element* k = p.k.row<Element>(place.batch, place.k_begin + key, head_kv);
      score = 0;
      for (int d = 0; d < p.q.width; ++d) {
        score += double{to_float(q[d])} * to_float(k[d]);
      }
      score *= p.scale;
    }
    scores[i] = score;
  }
  __syncthreads();
  double highest = kMinusInfinity;
  for (int i = 0; i < keys; ++i) {
    highest = fmax(highest, scores[i]);
  }
  double total = 0;
  for (int i = 0; i < keys; ++i) {
    total += scores[i] == kMinusInfinity ? 0.0 : exp(scores[i] - highest);
  }
  for (int d = threadIdx.x; d < p.v.width; d += blockDim.x) {
    double sum = 0;
    for (int i = 0; i < keys; ++i) {
      if (scores[i] != kMinusInfinity) {
        sum +=
            exp(scores[i] - highest) * to_float(p.v.row<Element>(place.batch, place.k_begin + key_of(i), head_kv)[d]);
      }
    }
    out[blockIdx.x * int64_t{p.v.width} + d] = total > 0.f ? static_cast<float>(sum / total) : 0.f;
  }
  if (threadIdx.x == 0) {
    lse[blockIdx.x] = total > 0.f ? static_cast<float>(highest + log(total)) : kMinusInfinity;
  }
}

enum class Choice { kRandom, kCorrelated, kHostile };

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
void make_lists(int32_t* to, const Case& c, int length_q, int length_k, Random& random) {
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
      while (static_cast<int>(free.size()) < wanted) {
        const int32_t block = 1 + static_cast<int32_t>(random.below(available));
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

  void launch90(cudaStream_t stream = nullptr) {
    with_tile_dims(c.dk, c.dv, [&](auto dk, auto dv) {
      if constexpr (dk <= 192) {
        if (!try_selected_forward_sm90<Element, dk, dv>(p, stream)) {
          throw std::runtime_error("not taken");
        }
      }
    });
  }
  void launch80() {
    with_tile_dims(c.dk, c.dv, [&](auto dk, auto dv) {
      if constexpr (dk <= 192) {
        launch_selected_forward_sm80<Element, dk, dv>(p, nullptr);
      }
    });
  }
};

struct Error {
  double out = 0;
  double lse = 0;
  int64_t first_bad = -1;  // sampled row
};

template <typename Element>
Error compare(const Problem<Element>& x, const std::vector<int32_t>& sample, const std::vector<float>& out,
              const std::vector<float>& lse) {
  const std::vector<Element> got = x.out.get();
  const std::vector<float> got_lse = x.lse.get();
  const auto worse = [](double& error, double a, double b) {
    const double difference = a == b ? 0 : std::abs(a - b);
    error = !(difference <= error) ? difference : error;
    return !(difference < 0.02);
  };
  Error error;
  const int dv = x.c.dv;
  for (size_t i = 0; i < sample.size(); ++i) {
    for (int h = 0; h < x.heads; ++h) {
      const int64_t row = static_cast<int64_t>(i) * x.heads + h;
      bool bad = false;
      for (int d = 0; d < dv; ++d) {
        bad |=
            worse(error.out, static_cast<float>(got[(int64_t{sample[i]} * x.heads + h) * dv + d]), out[row * dv + d]);
      }
      const int64_t at = x.packed ? h * x.tokens_q + sample[i]
                                  : (sample[i] / x.c.tq * int64_t{x.heads} + h) * x.c.tq + sample[i] % x.c.tq;
      bad |= worse(error.lse, got_lse[at], lse[row]);
      if (bad && error.first_bad < 0) {
        error.first_bad = row;
      }
    }
  }
  return error;
}

template <typename Element>
bool check(const Case& c, int samples) {
  Problem<Element> x(c);
  if (!selected_forward_fits_sm90(x.p)) {
    std::printf("%-28s not taken\n", c.name);
    return false;
  }
  std::vector<int32_t> sample;
  const int64_t step = std::max<int64_t>(1, x.tokens_q / samples);
  for (int64_t i = 0; i < x.tokens_q; i += step) {
    sample.push_back(static_cast<int32_t>(i));
  }
  if (!sample.empty()) {
    sample.back() = static_cast<int32_t>(x.tokens_q - 1);
  }
  Device<int32_t> device_sample(sample.size());
  device_sample.set(sample);
  Device<float> out(sample.size() * x.heads * c.dv);
  Device<float> lse(sample.size() * x.heads);
  plain_forward<Element><<<static_cast<unsigned>(sample.size() * x.heads), 128, c.n * 64 * 8>>>(x.p, device_sample.data,
                                                                                                out.data, lse.data);
  check_cuda(cudaDeviceSynchronize(), "plain");
  const std::vector<float> true_out = out.get();
  const std::vector<float> true_lse = lse.get();
  const auto poison = [&] {
    cudaMemset(x.out.data, 0xff, x.out.size * sizeof(Element));
    cudaMemset(x.lse.data, 0xff, x.lse.size * 4);
  };
  poison();
  x.launch80();
  check_cuda(cudaDeviceSynchronize(), "sm80");
  const Error old = compare(x, sample, true_out, true_lse);
  poison();
  x.launch90();
  check_cuda(cudaDeviceSynchronize(), c.name);
  const Error error = compare(x, sample, true_out, true_lse);
  const bool good = error.first_bad < 0 && error.out <= 2 * old.out + 1e-3 && error.lse <= 1e-3;
  std::printf("%-28s %s  error of out %.2e (sm_80 %.2e), of lse %.1e (%.1e)", c.name, good ? "ok " : "BAD", error.out,
              old.out, error.lse, old.lse);
  if (error.first_bad >= 0) {
    std::printf("  first bad: query %d head %d", sample[error.first_bad / x.heads],
                static_cast<int>(error.first_bad % x.heads));
  }
  std::printf("\n");
  std::fflush(stdout);
  return good;
}

// A launch that was captured in a graph does the same when the graph runs.
bool check_graph() {
  Problem<BFloat16> x({"graph", 2, 1000, 1000, 2, 16, 128, 128, 16});
  const char* const name = "graph";
  x.launch90();
  const std::vector<BFloat16> direct = x.out.get();
  cudaStream_t stream = nullptr;
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  check_cuda(cudaStreamCreate(&stream), name);
  check_cuda(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), name);
  x.launch90(stream);
  check_cuda(cudaStreamEndCapture(stream, &graph), name);
  check_cuda(cudaGraphInstantiate(&executable, graph, 0), name);
  check_cuda(cudaMemset(x.out.data, 0xff, x.out.size * 2), name);
  check_cuda(cudaGraphLaunch(executable, stream), name);
  check_cuda(cudaStreamSynchronize(stream), name);
  const std::vector<BFloat16> replayed = x.out.get();
  const bool good = std::memcmp(direct.data(), replayed.data(), direct.size() * 2) == 0;
  std::printf("%-28s %s\n", name, good ? "ok" : "BAD");
  return good;
}

// What the kernel does not take.
bool check_fallback() {
  Problem<BFloat16> x({"fallback", 1, 100, 100, 2, 16, 128, 128, 16});
  const auto taken = [&](auto&& change) {
    SelectedForwardParams p = x.p;
    change(p);
    return selected_forward_fits_sm90(p);
  };
  const bool good = taken([](auto&) {}) && !taken([](auto& p) { p.select_size = 32; }) &&
                    !taken([](auto& p) { p.num_selected = 65; }) && !taken([](auto& p) { p.k.token_stride = 260; }) &&
                    !taken([](auto& p) { p.v.head_stride = 0; }) && !taken([](auto& p) { p.q.width = 256; }) &&
                    !taken([](auto& p) { p.sequences.length_k = 0; });
  std::printf("%-28s %s\n", "fallback", good ? "ok" : "BAD");
  return good;
}

template <typename Launch>
double median_ms(const Launch& launch, int times) {
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

template <typename Element>
void time(const Case& c) {
  Problem<Element> x(c);
  const double new_ms = median_ms([&] { x.launch90(); }, 20);
  const double old_ms = median_ms([&] { x.launch80(); }, 5);
  std::printf("%-28s sm_90 %7.3f ms   sm_80 %7.3f ms\n", c.name, new_ms, old_ms);
  std::fflush(stdout);
}

}  // namespace

int main(int argc, char** argv) {
  const std::string what = argc > 1 ? argv[1] : "both";
  const Choice random = Choice::kRandom;
  const Choice correlated = Choice::kCorrelated;
  const Choice hostile = Choice::kHostile;
  bool good = true;
  std::thread([] {
    std::this_thread::sleep_for(std::chrono::seconds(60));
    std::printf("out of time\n");
    std::fflush(stdout);
    std::_Exit(2);
  }).detach();
  if (what != "time") {
    good &= check_graph();
    good &= check_fallback();
    good &= check<BFloat16>({"dense 2 x 2000", 2, 2000, 2000, 2, 16, 128, 128, 16}, 4000);
    good &= check<BFloat16>({"correlated", 1, 3000, 3000, 2, 16, 128, 128, 16, correlated}, 3000);
    for (int length : {1, 15, 16, 17, 63, 64, 65, 127, 129, 257}) {
      good &= check<BFloat16>({"short", 2, length, length, 2, 16, 128, 128, 16}, 1000);
    }
    good &= check<BFloat16>({"more keys than queries", 2, 77, 1201, 2, 16, 128, 128, 16}, 200);
    good &= check<BFloat16>({"more queries than keys", 2, 301, 130, 2, 16, 128, 128, 16}, 700);
    good &= check<BFloat16>({"any lists", 2, 500, 500, 2, 16, 128, 128, 16, hostile}, 1000);
    good &= check<BFloat16>({"any lists, n 64", 1, 700, 700, 2, 16, 128, 128, 64, hostile}, 1000);
    good &= check<BFloat16>({"n 3", 1, 700, 700, 2, 16, 128, 128, 3}, 1000);
    good &= check<BFloat16>({"n 32", 1, 3000, 3000, 2, 16, 128, 128, 32}, 1000);
    good &= check<BFloat16>({"negative scale", 1, 1000, 1000, 2, 16, 128, 128, 16, random, -1.f}, 1000);
    good &= check<BFloat16>({"G 1", 1, 1000, 1000, 2, 1, 128, 128, 16}, 1000);
    good &= check<BFloat16>({"G 4", 1, 1000, 1000, 4, 4, 128, 128, 16}, 1000);
    good &= check<BFloat16>({"G 8", 1, 1000, 1000, 2, 8, 128, 128, 16}, 1000);
    good &= check<BFloat16>({"G 24", 1, 1000, 1000, 2, 24, 128, 128, 16}, 1000);
    good &= check<BFloat16>({"d 64", 2, 1000, 1000, 2, 16, 64, 64, 16, correlated}, 1000);
    good &= check<BFloat16>({"d 64, n 64", 1, 5000, 5000, 2, 16, 64, 64, 64, correlated}, 1000);
    good &= check<BFloat16>({"d 192 / 128", 2, 1500, 1500, 2, 16, 192, 128, 16, correlated}, 1000);
    good &= check<BFloat16>({"d 192 / 128, n 64", 1, 5000, 5000, 2, 16, 192, 128, 64, correlated}, 1000);
    good &= check<BFloat16>({"d 80", 2, 1000, 1000, 2, 16, 80, 80, 16, correlated}, 1000);
    good &= check<Half>({"fp16", 2, 1500, 1500, 2, 16, 128, 128, 16, correlated}, 1000);
    good &= check<Half>({"fp16 G 8", 2, 1021, 1021, 2, 8, 128, 128, 16}, 1000);
    good &= check<Half>({"fp16 G 4, d 64", 2, 509, 509, 2, 4, 64, 64, 16}, 1000);
    good &= check<Half>({"fp16 d 192 / 128", 2, 1500, 1500, 2, 16, 192, 128, 16}, 1000);
    const std::vector<int32_t> ends = {0, 0, 1, 64, 193, 781, 781, 2048};
    good &= check<BFloat16>({"packed", 0, 0, 0, 2, 16, 128, 128, 16, random, 1.f, ends, ends}, 3000);
    good &= check<BFloat16>({"packed, any lists", 0, 0, 0, 2, 16, 128, 128, 16, hostile, 1.f, ends, ends}, 3000);
    good &= check<BFloat16>({"packed, NaN in unused keys",
                             0,
                             0,
                             0,
                             2,
                             16,
                             128,
                             128,
                             16,
                             random,
                             1.f,
                             {0, 40, 50, 350, 650},
                             {0, 64, 128, 640, 1500},
                             {40, 33, 500, 809}},
                            3000);
    good &= check<BFloat16>({"64k", 1, 65536, 65536, 4, 16, 128, 128, 16}, 300);
    good &= check<BFloat16>({"64k correlated", 1, 65536, 65536, 4, 16, 128, 128, 16, correlated}, 300);
    std::printf(good ? "all ok\n" : "SOME BAD\n");
  }
  if (what != "check") {
    time<BFloat16>({"8k random", 1, 8192, 8192, 4, 16, 128, 128, 16});
    time<BFloat16>({"8k correlated", 1, 8192, 8192, 4, 16, 128, 128, 16, correlated});
    time<BFloat16>({"64k random", 1, 65536, 65536, 4, 16, 128, 128, 16});
    time<BFloat16>({"64k correlated", 1, 65536, 65536, 4, 16, 128, 128, 16, correlated});
    time<BFloat16>({"16k random", 1, 16384, 16384, 4, 16, 128, 128, 16});
    time<BFloat16>({"4k random", 1, 4096, 4096, 4, 16, 128, 128, 16});
    time<BFloat16>({"64k random d 64", 1, 65536, 65536, 4, 16, 64, 64, 16});
    time<BFloat16>({"32k random d 192", 1, 32768, 32768, 4, 16, 192, 128, 16});
    time<BFloat16>({"32k correlated d 192", 1, 32768, 32768, 4, 16, 192, 128, 16, correlated});
    time<BFloat16>({"32k random G 4", 1, 32768, 32768, 16, 4, 128, 128, 16});
    time<BFloat16>({"32k random n 32", 1, 32768, 32768, 4, 16, 128, 128, 32});
  }
  return good ? 0 : 1;
}
