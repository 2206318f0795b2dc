// Selected attention's Hopper kernel for the gradient of q against a plain float64 one, and its time beside the sm_80
// kernel's. No torch:
//   nvcc -std=c++20 -O3 -I csrc -DNSA_BOUNDED_WAITS -gencode=arch=compute_90a,code=sm_90a \
//     tests/cuda/selected_backward_query_sm90.cu -o selected_backward_query_sm90
//   ./selected_backward_query_sm90 [check | time [cases whose names hold this]]
#include <chrono>
#include <thread>

#include "selected/launch_query_sm90.cuh"
#include "selected/launch_sm80.cuh"
#include "selected_problem.h"

using namespace nsa;
using namespace nsa_tests;

namespace {

// One block of threads per (sampled query of the batch, head).
template <typename Element>
__global__ void plain_backward_query(SelectedBackwardParams p, const int32_t* sample, float* grad_q) {
  extern __shared__ double grads[];
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
  const int64_t query = place.q_begin + at.index;
  const Element* q = p.q.row<Element>(place.batch, query, head);
  const Element* grad_out = p.grad_out.row<Element>(place.batch, query, head);
  const double lse = p.lse.at(place.batch, head, query);
  const double delta = p.delta.at(place.batch, head, query);
  const double gate = p.gate.data == nullptr ? 1. : p.gate.at(place.batch, head, query);
  const double grad_lse = p.grad_lse.data == nullptr ? 0. : p.grad_lse.at(place.batch, head, query);
  for (int i = threadIdx.x; i < keys; i += blockDim.x) {
    const int64_t key = key_of(i);
    grads[i] = 0;
    if (key >= 0) {
      const Element* k = p.k.row<Element>(place.batch, place.k_begin + key, head_kv);
      const Element* v = p.v.row<Element>(place.batch, place.k_begin + key, head_kv);
      double score = 0;
      double grad = 0;
      for (int d = 0; d < p.q.width; ++d) {
        score += double{to_float(q[d])} * to_float(k[d]);
      }
      for (int d = 0; d < p.v.width; ++d) {
        grad += double{to_float(grad_out[d])} * to_float(v[d]);
      }
      const double probability = exp(score * p.scale - lse);
      grads[i] = probability > kWholeProbability<Element> ? grad_lse : probability * gate * (grad - delta);
    }
  }
  __syncthreads();
  for (int d = threadIdx.x; d < p.q.width; d += blockDim.x) {
    double sum = 0;
    for (int i = 0; i < keys; ++i) {
      if (key_of(i) >= 0) {
        sum += grads[i] * to_float(p.k.row<Element>(place.batch, place.k_begin + key_of(i), head_kv)[d]);
      }
    }
    grad_q[blockIdx.x * int64_t{p.q.width} + d] = static_cast<float>(sum * p.scale);
  }
}

// delta = <dO, O> - grad_lse / gate, by one warp for each row.
template <typename Element>
__global__ void fill_delta(SelectedBackwardParams p, TensorView out, int64_t tokens) {
  const int heads = p.sequences.heads_kv * p.sequences.group;
  const int64_t row = blockIdx.x * int64_t{blockDim.x} / 32 + threadIdx.x / 32;
  if (row >= tokens * heads) {
    return;
  }
  const Tile at = find_query(p.sequences, row / heads);
  const SequencePlace place = place_of(p.sequences, at.sequence);
  const int head = static_cast<int>(row % heads);
  const int64_t query = place.q_begin + at.index;
  float sum = 0.f;
  for (int d = threadIdx.x % 32; d < out.width; d += 32) {
    sum += to_float(out.row<Element>(place.batch, query, head)[d]) *
           to_float(p.grad_out.row<Element>(place.batch, query, head)[d]);
  }
  for (int bit = 16; bit > 0; bit /= 2) {
    sum += __shfl_xor_sync(0xffffffffu, sum, bit);
  }
  const float gate = p.gate.data == nullptr ? 1.f : p.gate.at(place.batch, head, query);
  const float grad_lse = p.grad_lse.data == nullptr ? 0.f : p.grad_lse.at(place.batch, head, query);
  p.delta.at(place.batch, head, query) = sum - grad_lse / gate;
}

__global__ void fill_gate(float* gate, int64_t count) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < count; i += int64_t{gridDim.x} * blockDim.x) {
    gate[i] = 0.1f + static_cast<float>(i * 7919 % 1000) / 1100.f;
  }
}

template <typename Shape>
void launch_query_sm80(const SelectedBackwardParams& b) {
  launch_per_token(selected_backward_query<Shape>, Shape::kThreads,
                   selected_backward_query_shared_bytes<Shape>(b.num_selected), nullptr, "sm80", b);
}

template <typename Element>
struct BackwardProblem : Problem<Element> {
  using Base = Problem<Element>;
  Device<Element> grad_out, grad_q;
  Device<float> delta, gate, grad_lse;
  SelectedBackwardParams b{};

  BackwardProblem(const Case& c, bool gated)
      : Base(c),
        grad_out(this->out.size),
        grad_q(this->q.size),
        delta(this->lse.size),
        gate(gated ? this->lse.size : 0),
        grad_lse(gated ? this->lse.size : 0) {
    fill_normal<<<1024, 256>>>(grad_out.data, grad_out.size, 4);
    const auto& p = this->p;
    b.sequences = p.sequences;
    b.scale = p.scale;
    b.select_size = p.select_size;
    b.num_selected = p.num_selected;
    b.block_indices = p.block_indices;
    b.q = p.q;
    b.k = p.k;
    b.v = p.v;
    b.grad_out = p.out;
    b.grad_out.data = grad_out.data;
    b.grad_q = p.q;
    b.grad_q.data = grad_q.data;
    b.lse = p.lse;
    b.delta = b.gate = b.grad_lse = p.lse;
    b.delta.data = delta.data;
    b.gate.data = b.grad_lse.data = nullptr;
    if (gated) {
      fill_gate<<<256, 256>>>(gate.data, gate.size);
      fill_normal<<<256, 256>>>(grad_lse.data, grad_lse.size, 5);
      b.gate.data = gate.data;
      b.grad_lse.data = grad_lse.data;
    }
    forward80();
    fill_delta<Element>
        <<<static_cast<unsigned>(ceil_div(this->tokens_q * this->heads, 8)), 256>>>(b, p.out, this->tokens_q);
    check_cuda(cudaDeviceSynchronize(), "set up");
  }

  void forward80() {
    with_tile_dims(this->c.dk, this->c.dv, [&](auto dk, auto dv) {
      if constexpr (dk <= 192) {
        launch_selected_forward_sm80<Element, dk, dv>(this->p, nullptr);
      }
    });
  }
  void launch90() {
    with_tile_dims(this->c.dk, this->c.dv, [&](auto dk, auto dv) {
      if constexpr (dk <= 192) {
        if (!try_selected_backward_query_sm90<Element, dk, dv>(b, nullptr)) {
          throw std::runtime_error("not taken");
        }
      }
    });
  }
  void launch80() {
    with_tile_dims(this->c.dk, this->c.dv, [&](auto dk, auto dv) {
      if constexpr (dk <= 192) {
        launch_query_sm80<TokenShape<Element, dk, dv, 2>>(b);
      }
    });
  }
};

template <typename Element>
bool check(const Case& c, int samples, bool gated = true, bool add = false) {
  BackwardProblem<Element> x(c, gated);
  if (!selected_backward_query_fits_sm90(x.b)) {
    std::printf("%-28s not taken\n", c.name);
    return false;
  }
  x.b.add_to_grad_q = add;
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
  Device<float> grad_q(sample.size() * x.heads * c.dk);
  plain_backward_query<Element>
      <<<static_cast<unsigned>(sample.size() * x.heads), 128, c.n * 64 * 8>>>(x.b, device_sample.data, grad_q.data);
  check_cuda(cudaDeviceSynchronize(), "plain");
  const std::vector<float> right = grad_q.get();
  int64_t worst_at = 0;
  const auto error_of = [&](auto&& launch) {
    fill_normal<<<1024, 256>>>(x.grad_q.data, x.grad_q.size, 6);
    const std::vector<Element> before = x.grad_q.get();
    if (!add) {
      cudaMemset(x.grad_q.data, 0xff, x.grad_q.size * sizeof(Element));
    }
    launch();
    check_cuda(cudaDeviceSynchronize(), c.name);
    const std::vector<Element> got = x.grad_q.get();
    double squares = 0, total = 0, worst = 0;
    worst_at = 0;
    for (size_t i = 0; i < sample.size(); ++i) {
      for (int64_t j = 0; j < int64_t{x.heads} * c.dk; ++j) {
        const int64_t from = int64_t{sample[i]} * x.heads * c.dk + j;
        const double truth =
            double{right[i * x.heads * c.dk + j]} + (add ? double{static_cast<float>(before[from])} : 0.);
        const double difference = std::abs(static_cast<float>(got[from]) - truth);
        squares += difference * difference;
        total += truth * truth;
        if (!(difference <= worst)) {
          worst = difference;
          worst_at = from;
        }
      }
    }
    return std::pair<double, double>(total == 0 ? std::sqrt(squares) : std::sqrt(squares / total), worst);
  };
  const auto old = error_of([&] { x.launch80(); });
  const auto error = error_of([&] { x.launch90(); });
  const bool good = error.first <= 1.2 * old.first + 1e-5 && error.second <= 2 * old.second + 1e-4;
  std::printf("%-26s%s %s  error %.2e (sm_80 %.2e), worst %.1e (%.1e)\n", c.name, gated ? "" : " -",
              good ? "ok " : "BAD", error.first, old.first, error.second, old.second);
  if (!good) {
    std::printf("  worst: query %lld head %lld column %lld\n", static_cast<long long>(worst_at / (x.heads * c.dk)),
                static_cast<long long>(worst_at / c.dk % x.heads), static_cast<long long>(worst_at % c.dk));
  }
  std::fflush(stdout);
  return good;
}

// Runs agree to the last bit: a race would show.
bool check_repeated(const Case& c, int runs) {
  BackwardProblem<BFloat16> x(c, false);
  x.launch90();
  const std::vector<BFloat16> first = x.grad_q.get();
  int different = 0;
  for (int i = 0; i < runs; ++i) {
    check_cuda(cudaMemset(x.grad_q.data, 0xff, x.grad_q.size * 2), c.name);
    x.launch90();
    const std::vector<BFloat16> again = x.grad_q.get();
    different += std::memcmp(first.data(), again.data(), first.size() * 2) != 0 ? 1 : 0;
  }
  std::printf("%-28s %s  %d of %d runs differ\n", c.name, different == 0 ? "ok  " : "BAD", different, runs);
  return different == 0;
}

template <typename Element>
void time(const Case& c) {
  BackwardProblem<Element> x(c, true);
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
    good &= check_repeated({"repeated", 2, 2000, 2000, 2, 16, 128, 128, 16}, 50);
    good &= check_repeated({"repeated, d 192 / 128", 1, 1000, 1000, 2, 16, 192, 128, 16}, 20);
    const std::vector<int32_t> ends = {0, 0, 1, 64, 193, 781, 781, 2048};
    const std::vector<int32_t> q_ends = {0, 40, 50, 350, 650};
    const std::vector<int32_t> k_ends = {0, 64, 128, 640, 1500};
    const std::vector<int32_t> used = {40, 33, 500, 809};
    good &= check<BFloat16>({"packed", 0, 0, 0, 2, 16, 128, 128, 16, random, 1.f, ends, ends}, 3000);
    good &= check<BFloat16>({"packed, any lists", 0, 0, 0, 2, 8, 128, 128, 16, hostile, 1.f, ends, ends}, 3000);
    good &=
        check<BFloat16>({"packed, NaN unused", 0, 0, 0, 2, 16, 128, 128, 16, random, 1.f, q_ends, k_ends, used}, 3000);
    good &= check<BFloat16>({"d 64", 2, 1000, 1000, 2, 16, 64, 64, 16, correlated}, 1000);
    good &= check<BFloat16>({"d 64, n 64", 1, 5000, 5000, 2, 16, 64, 64, 64, correlated}, 1000);
    good &= check<BFloat16>({"d 192 / 128", 2, 1500, 1500, 2, 16, 192, 128, 16, correlated}, 1000);
    good &= check<BFloat16>({"d 192 / 128, n 64", 1, 5000, 5000, 2, 16, 192, 128, 64, correlated}, 1000);
    good &= check<BFloat16>({"d 80", 2, 1000, 1000, 2, 16, 80, 80, 16, correlated}, 1000);
    good &= check<Half>({"fp16", 2, 1500, 1500, 2, 16, 128, 128, 16, correlated}, 1000);
    good &= check<Half>({"fp16 G 8", 2, 1021, 1021, 2, 8, 128, 128, 16}, 1000);
    good &= check<Half>({"fp16 G 4, d 64", 2, 509, 509, 2, 4, 64, 64, 16}, 1000);
    good &= check<Half>({"fp16 d 192 / 128", 2, 1500, 1500, 2, 16, 192, 128, 16}, 1000);
    good &= check<BFloat16>({"dense 2 x 2000", 2, 2000, 2000, 2, 16, 128, 128, 16}, 4000);
    good &= check<BFloat16>({"dense", 2, 2000, 2000, 2, 16, 128, 128, 16}, 4000, false);
    good &= check<BFloat16>({"added", 2, 1000, 1000, 2, 16, 128, 128, 16}, 2000, true, true);
    good &= check<BFloat16>({"correlated", 1, 3000, 3000, 2, 16, 128, 128, 16, correlated}, 3000);
    for (int length : {1, 15, 17, 63, 64, 65, 129, 257}) {
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
    good &= check<BFloat16>({"G 12", 1, 1000, 1000, 2, 12, 128, 128, 16}, 1000);
    good &= check<BFloat16>({"G 24", 1, 1000, 1000, 2, 24, 128, 128, 16}, 1000);
    good &= check<BFloat16>({"64k", 1, 65536, 65536, 4, 16, 128, 128, 16}, 200);
    good &= check<BFloat16>({"64k correlated", 1, 65536, 65536, 4, 16, 128, 128, 16, correlated}, 200);
    std::printf(good ? "all ok\n" : "SOME BAD\n");
  }
  if (what != "check") {
    const std::string only = argc > 2 ? argv[2] : "";  // cases whose names hold this
    const auto time_case = [&](const Case& c) {
      if (std::string(c.name).find(only) != std::string::npos) {
        time<BFloat16>(c);
      }
    };
    time_case({"64k random", 1, 65536, 65536, 4, 16, 128, 128, 16});
    time_case({"64k correlated", 1, 65536, 65536, 4, 16, 128, 128, 16, correlated});
    time_case({"8k random", 1, 8192, 8192, 4, 16, 128, 128, 16});
    time_case({"8k correlated", 1, 8192, 8192, 4, 16, 128, 128, 16, correlated});
    time_case({"64k random d 64", 1, 65536, 65536, 4, 16, 64, 64, 16});
    time_case({"32k random d 192", 1, 32768, 32768, 4, 16, 192, 128, 16});
    time_case({"32k correlated d 192", 1, 32768, 32768, 4, 16, 192, 128, 16, correlated});
    time_case({"32k random n 32", 1, 32768, 32768, 4, 16, 128, 128, 32});
    time_case({"32k random G 8", 1, 32768, 32768, 8, 8, 128, 128, 16});
    time_case({"32k random G 4", 1, 32768, 32768, 16, 4, 128, 128, 16});
  }
  return good ? 0 : 1;
}
