// Calls every function of csrc/nsa.h, dense and packed: nsa_attention must equal its three branches put together, in
// values and gradients, and bad input must throw. Prints what differs and exits 1. ATen alone: no torch/torch.h.
#include <nsa.h>

#include <exception>
#include <iostream>
#include <string>
#include <tuple>
#include <vector>

namespace {

constexpr int64_t kQueryHeads = 4, kHeads = 2, kDim = 8;

bool failed = false;

void expect(bool condition, const std::string& what) {
  if (condition) {
    return;
  }
  std::cerr << "wrong: " << what << '\n';
  failed = true;
}

at::Tensor leaf(std::vector<int64_t> shape) { return at::randn(shape, at::kDouble).set_requires_grad(true); }

struct Inputs {
  at::Tensor q, k_raw, v_raw, k_slc, v_slc, k_win, v_win, gates;
  nsa::CompressionWeights phi;

  // `tokens` is (B, T) or (sum T).
  explicit Inputs(const std::vector<int64_t>& tokens, const nsa::Options& options) {
    const auto shape = [&tokens](int64_t heads, int64_t dim) {
      auto sizes = tokens;
      sizes.push_back(heads);
      sizes.push_back(dim);
      return sizes;
    };
    q = leaf(shape(kQueryHeads, kDim));
    for (at::Tensor* x : {&k_raw, &v_raw, &k_slc, &v_slc, &k_win, &v_win}) {
      *x = leaf(shape(kHeads, kDim));
    }
    gates = at::rand(shape(kQueryHeads, 3), at::kDouble).set_requires_grad(true);
    phi.pe = leaf({options.block_size, kDim});
    phi.w1 = leaf({12, options.block_size * kDim});
    phi.b1 = leaf({12});
    phi.w2 = leaf({kDim, 12});
    phi.b2 = leaf({kDim});
  }

  std::vector<at::Tensor> leaves() const {
    return {q, k_raw, v_raw, k_slc, v_slc, k_win, v_win, gates, *phi.pe, *phi.w1, *phi.b1, *phi.w2, *phi.b2};
  }

  // Gradients of the sum of out * weight, which are cleared on the way.
  std::vector<at::Tensor> gradients(const at::Tensor& out, const at::Tensor& weight) const {
    (out * weight).sum().backward({}, /*retain_graph=*/true);
    std::vector<at::Tensor> result;
    for (at::Tensor x : leaves()) {
      result.push_back(x.grad().clone());
      x.mutable_grad() = at::Tensor();
    }
    return result;
  }
};

void check_branches(const std::string& name, const Inputs& x, std::optional<int64_t> seqlen_k,
                    const nsa::Options& options, const nsa::Sequences& sequences) {
  const auto k_cmp = nsa::compress(x.k_raw, x.phi, options, sequences);
  const auto v_cmp = nsa::compress(x.v_raw, x.phi, options, sequences);
  const auto whole = nsa::nsa_attention(x.q, k_cmp, v_cmp, x.k_slc, x.v_slc, x.k_win, x.v_win, x.gates, options,
                                        std::nullopt, sequences);

  const auto [o_cmp, lse] = nsa::compressed_attention(x.q, k_cmp, v_cmp, seqlen_k, options, sequences);
  const auto blocks = nsa::select_blocks(x.q, k_cmp, lse, seqlen_k, options, sequences);
  expect(blocks.scalar_type() == at::kInt && blocks.size(-1) == options.num_selected, name + ": block list");
  const auto o_slc = std::get<0>(nsa::selected_attention(x.q, x.k_slc, x.v_slc, blocks, options, sequences));
  const auto o_win = std::get<0>(nsa::window_attention(x.q, x.k_win, x.v_win, options, sequences));
  const auto gates = x.gates.unsqueeze(-1).unbind(-2);
  const auto parts = gates[0] * o_cmp + gates[1] * o_slc + gates[2] * o_win;
  expect(at::allclose(whole, parts, 0, 1e-10), name + ": output");

  const auto given =
      nsa::nsa_attention(x.q, k_cmp, v_cmp, x.k_slc, x.v_slc, x.k_win, x.v_win, x.gates, options, blocks, sequences);
  expect(at::allclose(whole, given, 0, 1e-10), name + ": output with the blocks given");

  const auto weight = at::randn_like(whole);
  const auto of_whole = x.gradients(whole, weight), of_parts = x.gradients(parts, weight);
  for (size_t i = 0; i < of_whole.size(); ++i) {
    expect(at::allclose(of_whole[i], of_parts[i], 0, 1e-10), name + ": gradient " + std::to_string(i));
  }
}

int run() {
  at::manual_seed(0);
  nsa::Options options;
  options.block_size = 8;
  options.block_stride = 4;
  options.select_size = 8;
  options.num_selected = 4;
  options.window = 10;
  options.scale = 0.3;
  expect(nsa::num_blocks(7, options) == 0 && nsa::num_blocks(8, options) == 1 && nsa::num_blocks(37, options) == 8,
         "num_blocks");

  check_branches("dense", Inputs({2, 37}, options), 37, options, {});

  nsa::Sequences packed;
  packed.cu_seqlens_q = packed.cu_seqlens_k = at::tensor({0, 37, 37, 42, 70}, at::kInt);
  packed.max_seqlen_q = packed.max_seqlen_k = 37;
  check_branches("packed", Inputs({70}, options), std::nullopt, options, packed);

  const Inputs x({1, 16}, options);
  const auto mean = nsa::compress(x.k_raw, {}, options);
  expect(at::allclose(mean.select(1, 0), x.k_raw.slice(1, 0, 8).mean(1)), "compress without weights is the mean");

  options.num_selected = 2;
  bool threw = false;
  try {
    nsa::select_blocks(x.q, mean, at::zeros({1, kQueryHeads, 16}, at::kDouble), 16, options);
  } catch (const c10::ValueError& error) {
    threw = std::string(error.what()).find("num_selected") != std::string::npos;
  }
  expect(threw, "too small a num_selected throws c10::ValueError naming it");
  return failed ? 1 : 0;
}

}  // namespace

int main() {
  try {
    return run();
  } catch (const std::exception& error) {
    std::cerr << error.what() << '\n';
    return 1;
  }
}
