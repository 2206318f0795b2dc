// Trains a layer of Native Sparse Attention from C++ alone: no Python runs, none is linked.
//
// The task is associative recall. The first half of a sequence stores pairs of a key and a value, one pair a token; the
// second half asks for the keys in another order. The window is far too short to reach the answers, so the loss falls
// below chance only if the compressed and the selected branch learn to find the right token.
//
//   train_layer [STEPS] [WEIGHTS]     prints the loss, saves the weights and reads them back; exits 1 if it did not
//   learn
#include <nsa.h>
#include <torch/torch.h>

#include <cmath>
#include <cstdint>
#include <exception>
#include <iostream>
#include <string>

namespace {

constexpr int64_t kPairs = 32;
constexpr int64_t kValues = 8;
constexpr int64_t kAsked = kValues;  // stands where a value would, in the half that asks
constexpr int64_t kHidden = 64;

// phi of the compression branch: adds a position encoding to a block of keys or values, and maps it to one token.
struct BlockCompressionImpl : torch::nn::Module {
  BlockCompressionImpl(const nsa::Options& options, int64_t head_dim) {
    const int64_t block = options.block_size * head_dim;
    weights.pe = register_parameter("pe", torch::zeros({options.block_size, head_dim}));
    weights.w1 = register_parameter("w1", torch::randn({2 * head_dim, block}) / std::sqrt(double(block)));
    weights.b1 = register_parameter("b1", torch::zeros({2 * head_dim}));
    weights.w2 = register_parameter("w2", torch::randn({head_dim, 2 * head_dim}) / std::sqrt(2.0 * double(head_dim)));
    weights.b2 = register_parameter("b2", torch::zeros({head_dim}));
  }

  nsa::CompressionWeights weights;
};
TORCH_MODULE(BlockCompression);

// Hidden states (B, T, hidden) to the same shape. Keys and values have a projection for each of the three branches.
struct SparseAttentionImpl : torch::nn::Module {
  SparseAttentionImpl(int64_t hidden, int64_t num_heads, int64_t num_kv_heads, const nsa::Options& options)
      : options(options), num_heads(num_heads), num_kv_heads(num_kv_heads), head_dim(hidden / num_heads) {
    const auto linear = [](int64_t in, int64_t out) {
      return torch::nn::Linear(torch::nn::LinearOptions(in, out).bias(false));
    };
    q_proj = register_module("q_proj", linear(hidden, num_heads * head_dim));
    k_proj = register_module("k_proj", linear(hidden, 3 * num_kv_heads * head_dim));
    v_proj = register_module("v_proj", linear(hidden, 3 * num_kv_heads * head_dim));
    gate_proj = register_module("gate_proj", torch::nn::Linear(hidden, 3 * num_heads));
    o_proj = register_module("o_proj", linear(num_heads * head_dim, hidden));
    compress_k = register_module("compress_k", BlockCompression(options, head_dim));
    compress_v = register_module("compress_v", BlockCompression(options, head_dim));
  }

  torch::Tensor forward(const torch::Tensor& x) {
    const int64_t batch = x.size(0), length = x.size(1);
    const auto q = q_proj(x).view({batch, length, num_heads, head_dim});
    const auto k = k_proj(x).view({batch, length, num_kv_heads, 3, head_dim}).unbind(3);
    const auto v = v_proj(x).view({batch, length, num_kv_heads, 3, head_dim}).unbind(3);
    const auto gates = gate_proj(x).view({batch, length, num_heads, 3}).sigmoid();
    const auto k_cmp = nsa::compress(k[0], compress_k->weights, options);
    const auto v_cmp = nsa::compress(v[0], compress_v->weights, options);
    const auto out = nsa::nsa_attention(q, k_cmp, v_cmp, k[1], v[1], k[2], v[2], gates, options);
    return o_proj(out.flatten(2));
  }

  nsa::Options options;
  int64_t num_heads, num_kv_heads, head_dim;
  torch::nn::Linear q_proj{nullptr}, k_proj{nullptr}, v_proj{nullptr}, gate_proj{nullptr}, o_proj{nullptr};
  BlockCompression compress_k{nullptr}, compress_v{nullptr};
};
TORCH_MODULE(SparseAttention);

struct ModelImpl : torch::nn::Module {
  explicit ModelImpl(const nsa::Options& options) {
    keys = register_module("keys", torch::nn::Embedding(kPairs, kHidden));
    values = register_module("values", torch::nn::Embedding(kValues + 1, kHidden));
    attention = register_module("attention", SparseAttention(kHidden, /*num_heads=*/4, /*num_kv_heads=*/2, options));
    norm = register_module("norm", torch::nn::LayerNorm(torch::nn::LayerNormOptions({kHidden})));
    head = register_module("head", torch::nn::Linear(kHidden, kValues));
  }

  torch::Tensor forward(const torch::Tensor& key_ids, const torch::Tensor& value_ids) {
    const auto x = keys(key_ids) + values(value_ids);
    return head(norm(attention(x)));
  }

  torch::nn::Embedding keys{nullptr}, values{nullptr};
  SparseAttention attention{nullptr};
  torch::nn::LayerNorm norm{nullptr};
  torch::nn::Linear head{nullptr};
};
TORCH_MODULE(Model);

struct Batch {
  torch::Tensor keys, values;  // int64 (B, 2 * kPairs)
  torch::Tensor answers;       // int64 (B, kPairs): what the second half asks for
};

Batch make_batch(int64_t size) {
  const auto stored_keys = torch::rand({size, kPairs}).argsort(int64_t{1});
  const auto stored_values = torch::randint(kValues, {size, kPairs}, torch::kInt64);
  const auto order = torch::rand({size, kPairs}).argsort(int64_t{1});
  return {torch::cat({stored_keys, stored_keys.gather(1, order)}, 1),
          torch::cat({stored_values, torch::full_like(stored_values, kAsked)}, 1), stored_values.gather(1, order)};
}

torch::Tensor loss_of(Model& model, const Batch& batch) {
  const auto logits = model(batch.keys, batch.values).slice(1, kPairs);
  return torch::cross_entropy_loss(logits.flatten(0, 1), batch.answers.flatten());
}

int train(int64_t steps, const std::string& path) {
  torch::manual_seed(0);
  nsa::Options options;
  options.block_size = 4;
  options.block_stride = 2;
  options.select_size = 8;
  options.num_selected = 4;
  options.window = 4;
  Model model(options);
  torch::optim::AdamW optimizer(model->parameters(), torch::optim::AdamWOptions(3e-3).weight_decay(0.0));

  const Batch held_out = make_batch(64);
  const auto evaluate = [&](Model& m) {
    const torch::NoGradGuard no_grad;
    return loss_of(m, held_out).item<double>();
  };
  const double before = evaluate(model);
  std::cout << "chance " << std::log(double(kValues)) << ", before training " << before << '\n';
  for (int64_t step = 1; step <= steps; ++step) {
    optimizer.zero_grad();
    const auto loss = loss_of(model, make_batch(64));
    loss.backward();
    optimizer.step();
    if (step % 25 == 0 || step == steps) {
      std::cout << "step " << step << "  loss " << loss.item<double>() << std::endl;
    }
  }
  const double after = evaluate(model);
  std::cout << "held out " << after << '\n';

  torch::save(model, path);
  Model reloaded(options);
  torch::load(reloaded, path);
  const double again = evaluate(reloaded);
  std::cout << "reloaded from " << path << ": " << again << '\n';

  const bool learned = after < 0.75 * std::log(double(kValues));
  const bool same = again == after;
  if (!learned) {
    std::cerr << "the loss did not fall below three quarters of chance\n";
  }
  if (!same) {
    std::cerr << "the reloaded weights give another loss\n";
  }
  return learned && same ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return train(argc > 1 ? std::stoll(argv[1]) : 200, argc > 2 ? argv[2] : "layer.pt");
  } catch (const std::exception& error) {
    std::cerr << error.what() << '\n';
    return 1;
  }
}
