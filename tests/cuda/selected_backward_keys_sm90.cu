// The Hopper kernel of the gradients of k and v of selected attention against a plain float32 one, and its time beside
// the sm_80 kernel's and that of turning the lists round. No torch:
//   nvcc -std=c++20 -O3 -I csrc -DNSA_BOUNDED_WAITS -gencode=arch=compute_90a,code=sm_90a \
//     tests/cuda/selected_backward_keys_sm90.cu csrc/selected/lists.cu -o selected_backward_keys_sm90
//   ./selected_backward_keys_sm90 [check | time | profile]
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "selected/launch_keys_sm90.cuh"
#include "selected/launch_sm80.cuh"
#include "selected_backward_keys_problem.h"

using namespace nsa;

namespace {

template <typename Shape>
void launch_keys(const SelectedBackwardParams& params, cudaStream_t stream) {
  launch_selected_backward_keys_shape<Shape>(params, params.keys_heads, stream);
}

struct Kernel {
  const char* name;
  void (*launch)(const SelectedBackwardParams&, cudaStream_t);
};

int wrong = 0;
int right = 0;
int left_out = 0;
double largest_error = 0;

template <typename Element>
void check(const Case& c, Extra extra, const std::vector<Kernel>& kernels) {
  Problem<Element> problem(c, extra, true);
  if (!selected_backward_keys_fits_sm90(problem.p)) {
    ++left_out;
    return;
  }
  Device<float> partials(problem.partial_floats());
  problem.p.partials = partials.data;
  for (const Kernel& kernel : kernels) {
    const float nothing = c.cu_k.empty() ? std::numeric_limits<float>::quiet_NaN() : 0.f;
    fill_value<<<1024, 256>>>(problem.grad_k.data, problem.grad_k.size, nothing);
    fill_value<<<1024, 256>>>(problem.grad_v.data, problem.grad_v.size, nothing);
    fill_value<<<1024, 256>>>(partials.data, partials.size, std::numeric_limits<float>::quiet_NaN());
    kernel.launch(problem.p, nullptr);
    Device<Sums> sums(1);
    sums.set({Sums{}});
    const int64_t keys = count_slots(problem.p.sequences, problem.p.sequences.length_k, 1);
    compare_keys<Element><<<static_cast<unsigned>(keys * c.heads_kv), 32 * kWarps>>>(problem.p, sums.data);
    check_cuda(cudaDeviceSynchronize(), c.name);
    const std::vector<Element> first_k = problem.grad_k.get();
    const std::vector<Element> first_v = problem.grad_v.get();
    kernel.launch(problem.p, nullptr);
    const bool same = std::memcmp(first_k.data(), problem.grad_k.get().data(), first_k.size() * sizeof(Element)) == 0 &&
                      std::memcmp(first_v.data(), problem.grad_v.get().data(), first_v.size() * sizeof(Element)) == 0;
    const Sums e = sums.get()[0];
    const double error_k = std::sqrt(e.error_k / (e.norm_k + 1e-30));
    const double error_v = std::sqrt(e.error_v / (e.norm_v + 1e-30));
    const double allowed = __is_same(Element, Half) ? 1e-3 : 8e-3;
    if (error_k < allowed && error_v < allowed && same) {
      ++right;
      largest_error = std::max({largest_error, error_k, error_v});
    } else if (++wrong < 16) {
      std::printf("%-20s %-10s WRONG dk %.1e dv %.1e%s\n", c.name, kernel.name, error_k, error_v,
                  same ? "" : " and not twice the same");
      std::fflush(stdout);
    }
  }
}

template <typename Launch>
float time_once(cudaEvent_t begin, cudaEvent_t end, const Launch& launch_kernel) {
  cudaEventRecord(begin);
  launch_kernel();
  cudaEventRecord(end);
  check_cuda(cudaEventSynchronize(end), "timing");
  float ms = 0.f;
  cudaEventElapsedTime(&ms, begin, end);
  return ms;
}

// In turns, so that a GPU that slows down as it warms up slows all of them.
template <typename Element>
void time_kernels(const Case& c, const std::vector<Kernel>& kernels) {
  constexpr int kRepeats = 12;
  Problem<Element> problem(c, kGate, false);
  Device<float> partials(problem.partial_floats());
  problem.p.partials = partials.data;
  cudaEvent_t begin, end;
  cudaEventCreate(&begin);
  cudaEventCreate(&end);
  std::vector<std::vector<float>> times(kernels.size() + 1);
  std::vector<std::vector<Element>> results;
  for (int i = 0; i < kRepeats; ++i) {
    for (size_t kernel = 0; kernel < kernels.size(); ++kernel) {
      if (i > 4 && std::string(kernels[kernel].name) == "sm80") {
        continue;
      }
      const float ms = time_once(begin, end, [&] { kernels[kernel].launch(problem.p, nullptr); });
      if (i > 1) {
        times[kernel].push_back(ms);
      } else if (i == 0) {
        results.push_back(problem.grad_k.get());
        results.push_back(problem.grad_v.get());
      }
    }
    times.back().push_back(time_once(begin, end, [&] { launch_invert_lists(problem.invert, nullptr); }));
  }
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  std::printf("%s [%lld blocks, chunks of %d, pieces of up to %d]:", c.name, static_cast<long long>(problem.blocks),
              problem.key_pieces.chunk, problem.key_pieces.most_queries);
  for (size_t kernel = 0; kernel <= kernels.size(); ++kernel) {
    std::sort(times[kernel].begin(), times[kernel].end());
    const float ms = times[kernel][times[kernel].size() / 2];
    if (kernel == kernels.size()) {
      std::printf("  lists %.3f\n", ms);
      break;
    }
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
    std::printf("  %s %.3f (%.0e)", kernels[kernel].name, ms, worst);
  }
  std::fflush(stdout);
}

#include "selected_backward_keys_variants.h"

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
