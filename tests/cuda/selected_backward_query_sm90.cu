// Selected attention's Hopper kernel for the gradient of q against a plain float64 one, and its time beside the sm_80
// kernel's. No torch:
//   nvcc -std=c++20 -O3 -I csrc -DNSA_BOUNDED_WAITS -gencode=arch=compute_90a,code=sm_90a \
//     tests/cuda/selected_backward_query_sm90.cu -o selected_backward_query_sm90
//   ./selected_backward_query_sm90 [check | time [cases whose names hold this]]
#include <chrono>
#include <thread>

#include "selected_backward_problem.h"

using namespace nsa;
using namespace nsa_tests;

namespace {

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
    const std::vector<int32_t> whole = {0, 65536};
    time_case({"64k random packed", 0, 0, 0, 4, 16, 128, 128, 16, random, 1.f, whole, whole});
    time_case({"64k correlated packed", 0, 0, 0, 4, 16, 128, 128, 16, correlated, 1.f, whole, whole});
    time_case({"32k random d 192", 1, 32768, 32768, 4, 16, 192, 128, 16});
    time_case({"32k correlated d 192", 1, 32768, 32768, 4, 16, 192, 128, 16, correlated});
    time_case({"32k random n 32", 1, 32768, 32768, 4, 16, 128, 128, 32});
    time_case({"32k random G 8", 1, 32768, 32768, 8, 8, 128, 128, 16});
    time_case({"32k random G 4", 1, 32768, 32768, 16, 4, 128, 128, 16});
  }
  return good ? 0 : 1;
}
