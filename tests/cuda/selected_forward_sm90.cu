// Selected attention's Hopper kernel against a plain float64 one, and its time beside the sm_80 kernel's. No torch:
//   nvcc -std=c++20 -O3 -I csrc -DNSA_BOUNDED_WAITS -gencode=arch=compute_90a,code=sm_90a \
//     tests/cuda/selected_forward_sm90.cu -o selected_forward_sm90
//   ./selected_forward_sm90 [check | time [cases whose names hold this]]
#include <chrono>
#include <thread>

#include "selected/launch_sm80.cuh"
#include "selected/launch_sm90.cuh"
#include "selected_problem.h"

using namespace nsa;
using namespace nsa_tests;

namespace {

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

template <typename Element>
struct ForwardProblem : Problem<Element> {
  using Problem<Element>::Problem;

  void launch90(cudaStream_t stream = nullptr) {
    with_tile_dims(this->c.dk, this->c.dv, [&](auto dk, auto dv) {
      if constexpr (dk <= 192) {
        if (!try_selected_forward_sm90<Element, dk, dv>(this->p, stream)) {
          throw std::runtime_error("not taken");
        }
      }
    });
  }
  void launch80() {
    with_tile_dims(this->c.dk, this->c.dv, [&](auto dk, auto dv) {
      if constexpr (dk <= 192) {
        launch_selected_forward_sm80<Element, dk, dv>(this->p, nullptr);
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
  ForwardProblem<Element> x(c);
  if (!selected_forward_fits_sm90(x.p)) {
    std::printf("%-28s not taken\n", c.name);
    return false;
  }
  std::vector<int32_t> sample;
  const int64_t step = std::max<int64_t>(1, x.tokens_q / std::min(samples, kMostSamples));
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
  ForwardProblem<BFloat16> x({"graph", 2, 1000, 1000, 2, 16, 128, 128, 16});
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

// Runs agree to the last bit: a race would show.
bool check_repeated(int runs) {
  ForwardProblem<BFloat16> x({"repeated", 2, 2000, 2000, 2, 16, 128, 128, 16});
  x.launch90();
  const std::vector<BFloat16> first = x.out.get();
  int different = 0;
  for (int i = 0; i < runs; ++i) {
    check_cuda(cudaMemset(x.out.data, 0xff, x.out.size * 2), "repeated");
    x.launch90();
    const std::vector<BFloat16> again = x.out.get();
    different += std::memcmp(first.data(), again.data(), first.size() * 2) != 0 ? 1 : 0;
  }
  std::printf("%-28s %s  %d of %d runs differ\n", "repeated", different == 0 ? "ok  " : "BAD", different, runs);
  return different == 0;
}

// What the kernel does not take.
bool check_fallback() {
  ForwardProblem<BFloat16> x({"fallback", 1, 100, 100, 2, 16, 128, 128, 16});
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

template <typename Element>
void time(const Case& c) {
  ForwardProblem<Element> x(c);
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
    good &= check_repeated(50);
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
    good &= check<BFloat16>({"G 3, any lists", 2, 501, 501, 2, 3, 128, 128, 16, hostile}, 1000);
    good &= check<BFloat16>({"G 4, n 32", 1, 3000, 3000, 2, 4, 128, 128, 32}, 1000);
    good &= check<BFloat16>({"G 4, 256k keys", 1, 100, 262144, 1, 4, 128, 128, 16}, 100);
    good &= check<BFloat16>({"G 4, more keys", 1, 100, 262145, 1, 4, 128, 128, 16}, 100);
    good &= check<BFloat16>({"G 4, d 192 / 128", 1, 1000, 1000, 2, 4, 192, 128, 16, correlated}, 1000);
    good &= check<BFloat16>({"G 8", 1, 1000, 1000, 2, 8, 128, 128, 16}, 1000);
    good &= check<BFloat16>({"G 8, n 64", 1, 5000, 5000, 1, 8, 128, 128, 64}, 1000);
    good &= check<BFloat16>({"G 8, d 64, n 64", 1, 5000, 5000, 1, 8, 64, 64, 64}, 1000);
    good &= check<BFloat16>({"G 8, d 192 / 128, n 64", 1, 5000, 5000, 1, 8, 192, 128, 64}, 1000);
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
    const std::string only = argc > 2 ? argv[2] : "";  // cases whose names hold this
    const auto time_case = [&](const Case& c) {
      if (std::string(c.name).find(only) != std::string::npos) {
        time<BFloat16>(c);
      }
    };
    time_case({"8k random", 1, 8192, 8192, 4, 16, 128, 128, 16});
    time_case({"8k correlated", 1, 8192, 8192, 4, 16, 128, 128, 16, correlated});
    time_case({"64k random", 1, 65536, 65536, 4, 16, 128, 128, 16});
    time_case({"64k correlated", 1, 65536, 65536, 4, 16, 128, 128, 16, correlated});
    time_case({"16k random", 1, 16384, 16384, 4, 16, 128, 128, 16});
    time_case({"4k random", 1, 4096, 4096, 4, 16, 128, 128, 16});
    time_case({"64k random d 64", 1, 65536, 65536, 4, 16, 64, 64, 16});
    time_case({"32k random d 192", 1, 32768, 32768, 4, 16, 192, 128, 16});
    time_case({"32k correlated d 192", 1, 32768, 32768, 4, 16, 192, 128, 16, correlated});
    time_case({"64k correlated d 64", 1, 65536, 65536, 4, 16, 64, 64, 16, correlated});
    const std::vector<int32_t> whole = {0, 65536};
    time_case({"64k random packed", 0, 0, 0, 4, 16, 128, 128, 16, random, 1.f, whole, whole});
    time_case({"64k correlated packed", 0, 0, 0, 4, 16, 128, 128, 16, correlated, 1.f, whole, whole});
    time_case({"32k random", 1, 32768, 32768, 4, 16, 128, 128, 16});
    time_case({"32k random G 8", 1, 32768, 32768, 8, 8, 128, 128, 16});
    time_case({"32k random G 4", 1, 32768, 32768, 16, 4, 128, 128, 16});
    time_case({"32k random n 32", 1, 32768, 32768, 4, 16, 128, 128, 32});
  }
  return good ? 0 : 1;
}
