// Selected attention's backward on Hopper with the gradients of scores handed from kernel to kernel: the gradient of q
// against a plain float64 one, those of k and v against the kernel that hands nothing over, and times beside the two
// kernels that each compute scores for themselves. No torch:
//   nvcc -std=c++20 -O3 -I csrc -DNSA_BOUNDED_WAITS -gencode=arch=compute_90a,code=sm_90a \
//     tests/cuda/selected_backward_handed_sm90.cu csrc/selected/lists.cu -o selected_backward_handed_sm90
//   ./selected_backward_handed_sm90 [check | time | profile] [cases whose names hold this]
#include <chrono>
#include <limits>
#include <thread>

#include "selected/launch.h"
#include "selected/launch_handed_sm90.cuh"
#include "selected/pieces.h"
#include "selected_backward_problem.h"

using namespace nsa;
using namespace nsa_tests;

namespace {

template <typename Element>
struct HandedProblem : BackwardProblem<Element> {
  using Base = BackwardProblem<Element>;
  int64_t blocks, pairs;
  Device<Element> grad_k, grad_v;
  KeyPieces key_pieces;
  Device<int32_t> inverted, workspace, pieces, edges;
  Device<char> temporary;
  Device<float> partials;
  Device<char> handed;
  InvertListsParams invert{};

  static int64_t count_blocks(const Case& c) {
    const int64_t slots =
        c.cu_q.empty() ? c.batch * ceil_div(c.tk, 64) : c.cu_k.back() / 64 + static_cast<int64_t>(c.cu_k.size()) - 1;
    return slots * c.heads_kv;
  }
  // As the op's, for so many heads at a time.
  KeyPieces plan_pieces(int heads) const {
    return plan_key_pieces(this->p.sequences, this->c.n, pairs, blocks, 2 * (this->c.dk + this->c.dv), heads,
                           multiprocessors("device"));
  }

  HandedProblem(const Case& c, bool gated, int at_a_time = 0)
      : Base(c, gated),
        blocks(count_blocks(c)),
        pairs(this->lists.size),
        grad_k(this->k.size),
        grad_v(this->v.size),
        key_pieces(plan_pieces(heads_at_a_time(at_a_time))),
        inverted(pairs),
        workspace(3 * pairs),
        pieces(key_pieces_ints(key_pieces, this->p.sequences, blocks)),
        edges((2 * key_pieces.chunks + 1) * blocks),
        temporary(invert_lists_temporary_bytes(pairs, blocks)),
        partials(heads_at_a_time(at_a_time) * blocks / c.heads_kv * 64 * tile_row_size(c.dk, c.dv)),
        handed(handed_head_bytes(this->p.sequences, c.n) * heads_at_a_time(at_a_time) + kHandedEnd) {
    SelectedBackwardParams& b = this->b;
    b.grad_k = this->p.k;
    b.grad_k.data = grad_k.data;
    b.grad_v = this->p.v;
    b.grad_v.data = grad_v.data;
    b.partials = partials.data;
    b.keys_heads = b.handed.heads = heads_at_a_time(at_a_time);
    place_key_pieces(key_pieces, b.sequences, pieces.data);
    invert = {.sequences = b.sequences,
              .select_size = 64,
              .num_selected = c.n,
              .block_indices = b.block_indices,
              .pairs = pairs,
              .blocks = blocks,
              .segment = 0,
              .ranked = true,
              .keys = workspace.data,
              .sorted_keys = workspace.data + pairs,
              .values = workspace.data + 2 * pairs,
              .queries = inverted.data,
              .begins = nullptr,
              .segments = nullptr,
              .partials = nullptr,
              .pieces = key_pieces,
              .edges = edges.data,
              .pieces_before = edges.data + (key_pieces.chunks + 1) * blocks,
              .temporary = temporary.data,
              .temporary_bytes = temporary.size};
    b.chosen_by = {.blocks = blocks,
                   .segment = 0,
                   .ranks = Divisor(static_cast<uint32_t>(c.n)),
                   .queries = invert.queries,
                   .begins = nullptr,
                   .segments = nullptr,
                   .partials = nullptr,
                   .full_segments = 0,
                   .max_segments = 0,
                   .pieces = key_pieces};
    launch_invert_lists(invert, nullptr);
    check_cuda(cudaDeviceSynchronize(), "lists");
  }
  int heads_at_a_time(int wanted) const {
    return wanted > 0 ? wanted : handed_heads(this->p.sequences, this->c.n, this->c.dk);
  }

  // With the tile dimensions as constants.
  template <typename Launch>
  void with_dims(const Launch& launch) {
    with_test_dims(this->c.dk, this->c.dv, [&](auto dk, auto dv) {
      if constexpr (dk <= 192) {
        launch(dk, dv);
      }
    });
  }
  void launch_keys() {
    this->b.handed.data = nullptr;
    with_dims([&](auto dk, auto dv) { launch_selected_backward_keys_sm90<Element, dk, dv>(this->b, nullptr); });
  }
  void launch_handed() {
    this->b.handed.data = handed.data;
    with_dims([&](auto dk, auto dv) { launch_selected_backward_handed_sm90<Element, dk, dv>(this->b, nullptr); });
  }
};

template <typename T>
void poison(const Device<T>& data) {
  check_cuda(cudaMemset(data.data, 0xff, data.size * sizeof(T)), "memset");
}

int bad = 0;
std::string only;  // cases whose names hold this

template <typename Element>
void check(const Case& c, int samples, bool gated = true, bool add = false) {
  if (std::string(c.name).find(only) == std::string::npos) {
    return;
  }
  HandedProblem<Element> x(c, gated, 1);
  if (!selected_backward_handed_fits_sm90(x.b)) {
    std::printf("%-28s not taken\n", c.name);
    return;
  }
  x.b.add_to_grad_q = add;
  std::vector<int32_t> sample;
  const int64_t step = std::max<int64_t>(1, x.tokens_q / std::min(samples, kMostSamples));
  for (int64_t i = 0; i < x.tokens_q; i += step) {
    sample.push_back(static_cast<int32_t>(i));
  }
  sample.back() = static_cast<int32_t>(x.tokens_q - 1);
  Device<int32_t> device_sample(sample.size());
  device_sample.set(sample);
  Device<float> plain(sample.size() * x.heads * c.dk);
  plain_backward_query<Element>
      <<<static_cast<unsigned>(sample.size() * x.heads), 128, c.n * 64 * 8>>>(x.b, device_sample.data, plain.data);
  check_cuda(cudaDeviceSynchronize(), "plain");
  const std::vector<float> right = plain.get();
  const auto error_of = [&](auto&& launch) {
    fill_normal<<<1024, 256>>>(x.grad_q.data, x.grad_q.size, 6);
    const std::vector<Element> before = x.grad_q.get();
    if (!add) {
      poison(x.grad_q);
    }
    launch();
    check_cuda(cudaDeviceSynchronize(), c.name);
    const std::vector<Element> got = x.grad_q.get();
    double squares = 0, total = 0, worst = 0;
    for (size_t i = 0; i < sample.size(); ++i) {
      for (int64_t j = 0; j < int64_t{x.heads} * c.dk; ++j) {
        const int64_t from = int64_t{sample[i]} * x.heads * c.dk + j;
        const double truth =
            double{right[i * x.heads * c.dk + j]} + (add ? double{static_cast<float>(before[from])} : 0.);
        const double difference = std::abs(static_cast<float>(got[from]) - truth);
        squares += difference * difference;
        total += truth * truth;
        worst = difference <= worst ? worst : difference;
      }
    }
    return std::pair<double, double>(total == 0 ? std::sqrt(squares) : std::sqrt(squares / total), worst);
  };
  const auto old = error_of([&] { x.launch80(); });
  cudaMemset(x.grad_k.data, 0, x.grad_k.size * sizeof(Element));
  cudaMemset(x.grad_v.data, 0, x.grad_v.size * sizeof(Element));
  x.launch_keys();
  check_cuda(cudaDeviceSynchronize(), c.name);
  const std::vector<Element> k = x.grad_k.get();
  const std::vector<Element> v = x.grad_v.get();
  cudaMemset(x.grad_k.data, 0, x.grad_k.size * sizeof(Element));
  cudaMemset(x.grad_v.data, 0, x.grad_v.size * sizeof(Element));
  poison(x.handed);
  poison(x.partials);
  const auto error = error_of([&] { x.launch_handed(); });
  const bool same = std::memcmp(k.data(), x.grad_k.get().data(), k.size() * sizeof(Element)) == 0 &&
                    std::memcmp(v.data(), x.grad_v.get().data(), v.size() * sizeof(Element)) == 0;
  const std::vector<Element> first = x.grad_q.get();
  int differ = 0;
  for (int i = 0; i < 3 && !add; ++i) {
    poison(x.grad_q);
    poison(x.handed);
    x.launch_handed();
    differ += std::memcmp(first.data(), x.grad_q.get().data(), first.size() * sizeof(Element)) == 0 ? 0 : 1;
  }
  const bool good =
      error.first <= 1.2 * old.first + 1e-5 && error.second <= 2 * old.second + 1e-4 && same && differ == 0;
  bad += good ? 0 : 1;
  std::printf("%-26s%s %s  dq %.2e (sm_80 %.2e), worst %.1e (%.1e)%s%s\n", c.name, gated ? "" : " -",
              good ? "ok " : "BAD", error.first, old.first, error.second, old.second, same ? "" : ", dk and dv differ",
              differ == 0 ? "" : ", dq not always the same");
  std::fflush(stdout);
}

template <typename Element>
void time(const Case& c, const std::vector<int>& heads) {
  for (const int at_a_time : heads) {
    HandedProblem<Element> x(c, true, at_a_time);
    const double invert = median_ms([&] { launch_invert_lists(x.invert, nullptr); }, 11);
    const double all = median_ms([&] { x.launch_handed(); }, 15);
    double query = 0;
    double keys = 0;
    x.with_dims([&](auto dk, auto dv) {
      // One kernel after the other, of the heads that there is a place for.
      SelectedBackwardParams b = x.b;
      b.handed.queries = x.tokens_q;
      b.handed.first_head = 0;
      const double of_all = static_cast<double>(c.heads_kv) / b.handed.heads;
      keys = of_all * median_ms(
                          [&] {
                            launch_selected_backward_keys_heads<SelectedKeysSm90Shape<Element, dk, dv>>(
                                b, 0, b.handed.heads, nullptr);
                          },
                          9);
      query = of_all * median_ms(
                           [&] {
                             if (narrow_union(b.sequences, b.num_selected)) {
                               launch_selected_query_handed_shape<SelectedHandedShape<Element, dk, false>>(b, nullptr);
                             } else {
                               launch_selected_query_handed_shape<SelectedHandedShape<Element, dk, true>>(b, nullptr);
                             }
                           },
                           9);
    });
    std::printf("%-20s %d heads at a time, %lld MB: %6.3f = dk,dv %.3f + dq %.3f; lists %.3f\n", c.name,
                x.b.handed.heads, static_cast<long long>(x.handed.size >> 20), all, keys, query, invert);
    std::fflush(stdout);
  }
  HandedProblem<Element> x(c, true, c.heads_kv);
  x.invert.ranked = false;
  x.b.chosen_by.ranks = Divisor();
  launch_invert_lists(x.invert, nullptr);
  const double keys = median_ms([&] { x.launch_keys(); }, 9);
  const double query = median_ms([&] { x.launch90(); }, 9);
  std::printf("%-20s two kernels: %6.3f = dk,dv %.3f + dq %.3f; lists %.3f\n", c.name, keys + query, keys, query,
              median_ms([&] { launch_invert_lists(x.invert, nullptr); }, 9));
}

}  // namespace

int main(int argc, char** argv) {
  const std::string what = argc > 1 ? argv[1] : "both";
  only = argc > 2 ? argv[2] : "";
  const Choice random = Choice::kRandom;
  const Choice correlated = Choice::kCorrelated;
  const Choice popular = Choice::kPopular;
  const Choice hostile = Choice::kHostile;
  std::thread([] {
    std::this_thread::sleep_for(std::chrono::seconds(60));
    std::printf("out of time\n");
    std::fflush(stdout);
    std::_Exit(2);
  }).detach();
  if (what == "both" || what == "check") {
    const std::vector<int32_t> ends = {0, 0, 1, 64, 193, 781, 781, 2048};
    const std::vector<int32_t> q_ends = {0, 40, 50, 350, 650};
    const std::vector<int32_t> k_ends = {0, 64, 128, 640, 1500};
    const std::vector<int32_t> used = {40, 33, 500, 809};
    check<BFloat16>({"dense 2 x 2000", 2, 2000, 2000, 2, 16, 128, 128, 16}, 4000);
    check<BFloat16>({"packed", 0, 0, 0, 2, 16, 128, 128, 16, random, 1.f, ends, ends}, 3000);
    check<BFloat16>({"packed, any lists", 0, 0, 0, 2, 8, 128, 128, 16, hostile, 1.f, ends, ends}, 3000);
    check<BFloat16>({"packed, NaN unused", 0, 0, 0, 2, 16, 128, 128, 16, random, 1.f, q_ends, k_ends, used}, 3000);
    check<BFloat16>({"dense, no gate", 2, 2000, 2000, 2, 16, 128, 128, 16}, 4000, false);
    check<BFloat16>({"added", 2, 1000, 1000, 2, 16, 128, 128, 16}, 2000, true, true);
    check<BFloat16>({"correlated", 1, 3000, 3000, 2, 16, 128, 128, 16, correlated}, 3000);
    check<BFloat16>({"popular", 1, 5000, 5000, 2, 16, 128, 128, 16, popular}, 3000);
    check<BFloat16>({"popular, packed", 0, 0, 0, 2, 8, 128, 128, 16, popular, 1.f, ends, ends}, 3000);
    for (int length : {1, 15, 17, 63, 64, 65, 129, 257}) {
      check<BFloat16>({"short", 2, length, length, 2, 16, 128, 128, 16}, 1000);
    }
    check<BFloat16>({"more keys than queries", 2, 77, 1201, 2, 16, 128, 128, 16}, 200);
    check<BFloat16>({"more queries than keys", 2, 301, 130, 2, 16, 128, 128, 16}, 700);
    check<BFloat16>({"any lists", 2, 500, 500, 2, 16, 128, 128, 16, hostile}, 1000);
    check<BFloat16>({"any lists, n 64", 1, 700, 700, 2, 16, 128, 128, 64, hostile}, 1000);
    check<BFloat16>({"n 3", 1, 700, 700, 2, 16, 128, 128, 3}, 1000);
    check<BFloat16>({"n 32", 1, 3000, 3000, 2, 16, 128, 128, 32}, 1000);
    check<BFloat16>({"negative scale", 1, 1000, 1000, 2, 16, 128, 128, 16, random, -1.f}, 1000);
    for (int group : {4, 5, 8, 12, 20, 24, 48}) {
      const std::string name = "G " + std::to_string(group);
      check<BFloat16>({name.c_str(), 1, 1000, 1000, 2, group, 128, 128, 16}, 1000);
    }
#if !defined(NSA_ONLY_128)
    check<BFloat16>({"d 64", 2, 1000, 1000, 2, 16, 64, 64, 16, correlated}, 1000);
    check<BFloat16>({"d 64, n 64", 1, 5000, 5000, 2, 16, 64, 64, 64, correlated}, 1000);
    check<BFloat16>({"d 192 / 128", 2, 1500, 1500, 2, 16, 192, 128, 16, correlated}, 1000);
    check<BFloat16>({"d 192 / 128, n 64", 1, 5000, 5000, 2, 16, 192, 128, 64, correlated}, 1000);
    check<BFloat16>({"d 80", 2, 1000, 1000, 2, 16, 80, 80, 16, correlated}, 1000);
    check<Half>({"fp16", 2, 1500, 1500, 2, 16, 128, 128, 16, correlated}, 1000);
    check<Half>({"fp16 G 8", 2, 1021, 1021, 2, 8, 128, 128, 16}, 1000);
    check<Half>({"fp16 G 4, d 64", 2, 509, 509, 2, 4, 64, 64, 16}, 1000);
    check<Half>({"fp16 d 192 / 128", 2, 1500, 1500, 2, 16, 192, 128, 16}, 1000);
#endif
    check<BFloat16>({"64k", 1, 65536, 65536, 4, 16, 128, 128, 16}, 200);
    check<BFloat16>({"64k correlated", 1, 65536, 65536, 4, 16, 128, 128, 16, correlated}, 200);
    check<BFloat16>({"64k popular", 1, 65536, 65536, 4, 16, 128, 128, 16, popular}, 200);
    std::printf(bad == 0 ? "all ok\n" : "%d BAD\n", bad);
  }
  if (what == "both" || what == "time") {
    const auto time_case = [&](const Case& c, const std::vector<int>& heads) {
      if (std::string(c.name).find(only) != std::string::npos) {
        time<BFloat16>(c, heads);
      }
    };
    time_case({"64k random", 1, 65536, 65536, 4, 16, 128, 128, 16}, {4, 2, 1});
    time_case({"64k correlated", 1, 65536, 65536, 4, 16, 128, 128, 16, correlated}, {4, 2, 1});
    time_case({"64k popular", 1, 65536, 65536, 4, 16, 128, 128, 16, popular}, {4, 2, 1});
    time_case({"8k random", 1, 8192, 8192, 4, 16, 128, 128, 16}, {4});
    time_case({"8k correlated", 1, 8192, 8192, 4, 16, 128, 128, 16, correlated}, {4});
    time_case({"8k popular", 1, 8192, 8192, 4, 16, 128, 128, 16, popular}, {4});
    time_case({"16 x 4k random", 16, 4096, 4096, 4, 16, 128, 128, 16}, {4, 2, 1});
#if !defined(NSA_ONLY_128)
    time_case({"64k random d 64", 1, 65536, 65536, 4, 16, 64, 64, 16}, {1});
    time_case({"32k random d 192", 1, 32768, 32768, 4, 16, 192, 128, 16}, {2});
    time_case({"32k correlated d 192", 1, 32768, 32768, 4, 16, 192, 128, 16, correlated}, {2});
    time_case({"32k random n 32", 1, 32768, 32768, 4, 16, 128, 128, 32}, {1});
    time_case({"32k popular G 8", 1, 32768, 32768, 8, 8, 128, 128, 16, popular}, {8});
    time_case({"32k random G 8", 1, 32768, 32768, 8, 8, 128, 128, 16}, {8, 4});
    time_case({"32k random G 4", 1, 32768, 32768, 16, 4, 128, 128, 16}, {16, 8});
#endif
  }
  if (what == "profile") {
    HandedProblem<BFloat16> x({"64k random", 1, 65536, 65536, 4, 16, 128, 128, 16}, true, 1);
    x.launch_handed();
    check_cuda(cudaDeviceSynchronize(), "profile");
  }
  return bad == 0 ? 0 : 1;
}
