// What the test of selected attention's gradients of k and v runs over: cases, their tensors on the device, and the
// plain float32 kernels that make and compare them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <vector>

#include "backward_keys_testing.h"
#include "common/launch_sm90.cuh"
#include "selected/launch.h"
#include "selected/pieces.h"

namespace nsa {

// lse and delta of a row by the definition, a warp a row; or, of many keys, one that no score comes near.
template <typename Element>
__global__ void fill_rows(const __grid_constant__ SelectedBackwardParams p, int64_t rows, bool exact) {
  const Sequences& s = p.sequences;
  const int64_t row = blockIdx.x * int64_t{kWarps} + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int heads = s.heads_kv * s.group;
  const int64_t token = row / heads;
  const int head = static_cast<int>(row % heads);
  if (row >= rows) {
    return;
  }
  const Tile at = find_query(s, token);
  const SequencePlace place = place_of(s, at.sequence);
  const int64_t place_token = place.q_begin + at.index;
  const int position = place.offset + at.index;
  const int32_t* list = p.block_indices + (token * s.heads_kv + head / s.group) * p.num_selected;
  const Element* q = p.q.row<Element>(place.batch, place_token, head);
  const Element* grad_out = p.grad_out.row<Element>(place.batch, place_token, head);
  float maximum = kMinusInfinity;
  float sum = 0.f;
  float product = 0.f;
  int seen = 0;
  for (int i = 0; i < p.num_selected; ++i) {
    const int begin = max(list[i], 0) * p.select_size;
    const int end = list[i] < 0 ? 0 : min(min(begin + p.select_size, position + 1), place.k_length);
    seen += max(end - begin, 0);
    for (int key = begin; exact && key < end; ++key) {
      const int64_t at_key = place.k_begin + key;
      const float score = p.scale * dot(q, p.k.row<Element>(place.batch, at_key, head / s.group), p.q.width, lane);
      const float grad = dot(grad_out, p.v.row<Element>(place.batch, at_key, head / s.group), p.v.width, lane);
      const float highest = fmaxf(maximum, score);
      const float factor = maximum == kMinusInfinity ? 0.f : expf(maximum - highest);
      const float weight = expf(score - highest);
      sum = sum * factor + weight;
      product = product * factor + weight * grad;
      maximum = highest;
    }
  }
  if (lane == 0) {
    const float grad_lse = p.grad_lse.data == nullptr ? 0.f : p.grad_lse.at(place.batch, head, place_token);
    float& lse = p.lse.at(place.batch, head, place_token);
    lse = seen == 0 ? kMinusInfinity : exact ? maximum + logf(sum) : logf(seen) + 4.f;
    p.delta.at(place.batch, head, place_token) = exact ? (sum > 0.f ? product / sum : 0.f) - grad_lse : 0.01f;
  }
}

// The gradients of a key by the definition, a block of threads a key and KV head, and how far the kernel's are from
// them.
template <typename Element>
__global__ void compare_keys(const __grid_constant__ SelectedBackwardParams p, Sums* sums) {
  const Sequences& s = p.sequences;
  const int head_kv = blockIdx.x % s.heads_kv;
  const Tile tile = find_tile(s, s.cumulative_k, 1, s.length_k, 1, blockIdx.x / s.heads_kv);
  const SequencePlace place = place_of(s, tile.sequence);
  const int key = tile.index;
  if (key >= place.k_length) {
    return;
  }
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const Element* k = p.k.row<Element>(place.batch, place.k_begin + key, head_kv);
  const Element* v = p.v.row<Element>(place.batch, place.k_begin + key, head_kv);
  float grad_k[6] = {};
  float grad_v[6] = {};
  const int first = max(key - place.offset, 0);
  for (int query = first; query < place.q_length; ++query) {
    const int64_t of_batch = place.batch * s.length_q + place.q_begin + query;
    const int32_t* list = p.block_indices + (of_batch * s.heads_kv + head_kv) * p.num_selected;
    bool chosen = false;
    for (int i = 0; i < p.num_selected; ++i) {
      chosen |= list[i] == key / p.select_size;
    }
    for (int g = chosen ? warp : s.group; g < s.group; g += kWarps) {
      const int64_t token = place.q_begin + query;
      const int head = head_kv * s.group + g;
      const Element* q = p.q.row<Element>(place.batch, token, head);
      const Element* grad_out = p.grad_out.row<Element>(place.batch, token, head);
      const float gate = p.gate.data == nullptr ? 1.f : p.gate.at(place.batch, head, token);
      const float weight = gate * expf(p.scale * dot(q, k, p.q.width, lane) - p.lse.at(place.batch, head, token));
      const float grad = weight * (dot(grad_out, v, p.v.width, lane) - p.delta.at(place.batch, head, token));
      for (int i = 0; i < 6; ++i) {
        const int column = lane + 32 * i;
        grad_k[i] += column < p.q.width ? grad * to_float(q[column]) : 0.f;
        grad_v[i] += column < p.v.width ? weight * to_float(grad_out[column]) : 0.f;
      }
    }
  }
  add_errors<Element>(grad_k, grad_v, p.scale, p.grad_k.row<Element>(place.batch, place.k_begin + key, head_kv),
                      p.grad_k.width, p.grad_v.row<Element>(place.batch, place.k_begin + key, head_kv), p.grad_v.width,
                      sums);
}

enum Extra { kGate, kGradLse, kNeither };

struct Case {
  const char* name;
  int64_t batch, tokens_q, tokens_k;
  int heads_kv, group, dim_k, dim_v, n;
  bool correlated = false;
  std::vector<int32_t> cu_q{}, cu_k{}, used{};
  int segment = 0;  // queries of a segment or a piece, or 0: as many as the op's
  int chunk = 0;    // the same of a chunk
};

// Lists of one sequence: block 0, the last two, and free ones, ascending, -1 last.
void make_lists(int32_t* to, const Case& c, int length_q, int length_k, Random& random) {
  for (int h = 0; h < c.heads_kv; ++h) {
    std::vector<int32_t> free;
    for (int i = 0; i < length_q; ++i) {
      int32_t* list = to + (int64_t{i} * c.heads_kv + h) * c.n;
      std::fill(list, list + c.n, -1);
      const int position = length_k - length_q + i;
      if (position < 0) {
        continue;
      }
      const int own = position / 64;
      std::vector<int32_t> chosen;
      for (int block : {0, own - 1, own}) {
        if (block >= 0 && std::find(chosen.begin(), chosen.end(), block) == chosen.end()) {
          chosen.push_back(block);
        }
      }
      const int available = std::max(own - 2, 0);  // blocks 1 .. own - 2
      const int wanted = std::min(available, c.n - 3);
      if (c.correlated) {
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
  const Case c;
  bool packed;
  int64_t tokens_q, tokens_k;  // of all sequences
  int heads;
  int64_t blocks, pairs;
  KeyPieces key_pieces;
  Device<Element> q, k, v, grad_out, grad_k, grad_v;
  Device<float> lse, delta, gate, grad_lse;
  Device<int32_t> lists, cu_q, cu_k, used, inverted, workspace, pieces, edges;
  Device<char> temporary;
  InvertListsParams invert{};
  SelectedBackwardParams p{};

  int64_t count_blocks() const {
    return (packed ? tokens_k / 64 + static_cast<int64_t>(c.cu_k.size()) - 1 : c.batch * ceil_div(c.tokens_k, 64)) *
           c.heads_kv;
  }

  // As the op's, where the case does not say.
  KeyPieces plan_pieces() const {
    const Sequences s{.batch = packed ? static_cast<int32_t>(c.cu_k.size()) - 1 : static_cast<int32_t>(c.batch),
                      .heads_kv = c.heads_kv,
                      .group = c.group,
                      .length_q = packed ? tokens_q : c.tokens_q,
                      .length_k = packed ? tokens_k : c.tokens_k,
                      .cumulative_k = packed ? c.cu_k.data() : nullptr};
    KeyPieces result =
        plan_key_pieces(s, c.n, pairs, blocks, 2 * (c.dim_k + c.dim_v), c.heads_kv, multiprocessors("device"));
    if (c.segment > 0) {
      result.most_queries = c.segment;
      result.most_queries_at_last = c.segment / 2;
    }
    if (c.chunk > 0) {
      result.chunk = c.chunk;
      result.chunks = static_cast<int32_t>(ceil_div(tokens_q, c.chunk));
    }
    result.most_pieces = bound_key_pieces(result, pairs / c.heads_kv, blocks / c.heads_kv);
    return result;
  }

  Problem(const Case& of, Extra extra, bool exact)
      : c(of),
        packed(!c.cu_q.empty()),
        tokens_q(packed ? c.cu_q.back() : c.batch * c.tokens_q),
        tokens_k(packed ? c.cu_k.back() : c.batch * c.tokens_k),
        heads(c.heads_kv * c.group),
        blocks(count_blocks()),
        pairs(tokens_q * c.heads_kv * c.n),
        key_pieces(plan_pieces()),
        q(tokens_q * heads * c.dim_k),
        k(tokens_k * c.heads_kv * c.dim_k),
        v(tokens_k * c.heads_kv * c.dim_v),
        grad_out(tokens_q * heads * c.dim_v),
        grad_k(k.size),
        grad_v(v.size),
        lse(tokens_q * heads),
        delta(lse.size),
        gate(lse.size),
        grad_lse(lse.size),
        lists(pairs),
        cu_q(c.cu_q.size()),
        cu_k(c.cu_k.size()),
        used(c.used.size()),
        inverted(pairs + 3 * (blocks + 1)),
        workspace(3 * pairs),
        pieces(c.heads_kv * key_pieces.most_pieces * 8 + c.heads_kv + blocks + c.heads_kv),
        edges((2 * key_pieces.chunks + 1) * blocks),
        temporary(invert_lists_temporary_bytes(pairs, blocks)) {
    fill_normal<<<1024, 256>>>(q.data, q.size, 1, 0.f, 1.f);
    fill_normal<<<1024, 256>>>(k.data, k.size, 2, 0.f, 1.f);
    fill_normal<<<1024, 256>>>(v.data, v.size, 3, 0.f, 1.f);
    fill_normal<<<1024, 256>>>(grad_out.data, grad_out.size, 4, 0.f, 1.f);
    fill_normal<<<1024, 256>>>(gate.data, gate.size, 5, 0.5f, 0.3f);
    fill_normal<<<1024, 256>>>(grad_lse.data, grad_lse.size, 6, 0.f, 1.f);
    Random random{uint64_t{12345} + c.n};
    std::vector<int32_t> all(pairs);
    const int sequences = packed ? static_cast<int>(c.cu_q.size()) - 1 : static_cast<int>(c.batch);
    const float nan = std::numeric_limits<float>::quiet_NaN();
    for (int b = 0; b < sequences; ++b) {
      const int64_t begin = packed ? c.cu_q[b] : b * c.tokens_q;
      const auto length_q = static_cast<int>(packed ? c.cu_q[b + 1] - c.cu_q[b] : c.tokens_q);
      const auto length_k = static_cast<int>(!packed          ? c.tokens_k
                                             : c.used.empty() ? c.cu_k[b + 1] - c.cu_k[b]
                                                              : c.used[b]);
      make_lists(all.data() + begin * c.heads_kv * c.n, c, length_q, length_k, random);
      if (!c.used.empty()) {  // what lies in unused slots is nobody's
        const int64_t first = c.cu_k[b] + c.used[b];
        const int64_t unused = c.cu_k[b + 1] - first;
        fill_value<<<64, 256>>>(k.data + first * c.heads_kv * c.dim_k, unused * c.heads_kv * c.dim_k, nan);
        fill_value<<<64, 256>>>(v.data + first * c.heads_kv * c.dim_v, unused * c.heads_kv * c.dim_v, nan);
      }
    }
    lists.set(all);
    cu_q.set(c.cu_q);
    cu_k.set(c.cu_k);
    used.set(c.used);
    p.sequences = {.batch = sequences,
                   .heads_kv = c.heads_kv,
                   .group = c.group,
                   .by_group = Divisor(static_cast<uint32_t>(c.group)),
                   .length_q = packed ? tokens_q : c.tokens_q,
                   .length_k = packed ? tokens_k : c.tokens_k,
                   .cumulative_q = packed ? cu_q.data : nullptr,
                   .cumulative_k = packed ? cu_k.data : nullptr,
                   .used_k = c.used.empty() ? nullptr : used.data,
                   .cumulative_cmp = nullptr};
    p.scale = 1.f / std::sqrt(static_cast<float>(c.dim_k));
    p.select_size = 64;
    p.num_selected = c.n;
    p.block_indices = lists.data;
    const auto view = [&](Element* data, int64_t length, int64_t all_heads, int width) {
      return TensorView{data, packed ? 0 : length * all_heads * width, all_heads * width, width, width};
    };
    const auto numbers = [&](float* data) {
      return packed ? RowView{data, 0, tokens_q} : RowView{data, heads * c.tokens_q, c.tokens_q};
    };
    p.q = view(q.data, c.tokens_q, heads, c.dim_k);
    p.grad_out = view(grad_out.data, c.tokens_q, heads, c.dim_v);
    p.k = view(k.data, c.tokens_k, c.heads_kv, c.dim_k);
    p.v = view(v.data, c.tokens_k, c.heads_kv, c.dim_v);
    p.grad_k = view(grad_k.data, c.tokens_k, c.heads_kv, c.dim_k);
    p.grad_v = view(grad_v.data, c.tokens_k, c.heads_kv, c.dim_v);
    p.lse = numbers(lse.data);
    p.delta = numbers(delta.data);
    p.gate = extra == kGate ? numbers(gate.data) : RowView{};
    p.grad_lse = extra == kGradLse ? numbers(grad_lse.data) : RowView{};
    fill_rows<Element><<<static_cast<unsigned>((lse.size + kWarps - 1) / kWarps), 32 * kWarps>>>(p, lse.size, exact);
    check_cuda(cudaDeviceSynchronize(), "rows");

    const int64_t segment =
        c.segment > 0 ? c.segment : std::max<int64_t>(ceil_div(pairs, int64_t{8} * multiprocessors("device")), 256);
    int32_t* const at = inverted.data;
    place_key_pieces(key_pieces, p.sequences, pieces.data);
    invert = {.sequences = p.sequences,
              .select_size = 64,
              .num_selected = c.n,
              .block_indices = lists.data,
              .pairs = pairs,
              .blocks = blocks,
              .segment = static_cast<int32_t>(segment),
              .keys = workspace.data,
              .sorted_keys = workspace.data + pairs,
              .values = workspace.data + 2 * pairs,
              .queries = at,
              .begins = at + pairs,
              .segments = at + pairs + blocks + 1,
              .partials = at + pairs + 2 * (blocks + 1),
              .pieces = key_pieces,
              .edges = edges.data,
              .pieces_before = edges.data + (key_pieces.chunks + 1) * blocks,
              .temporary = temporary.data,
              .temporary_bytes = temporary.size};
    launch_invert_lists(invert, nullptr);
    check_cuda(cudaDeviceSynchronize(), "lists");
    p.chosen_by = {.blocks = blocks,
                   .segment = invert.segment,
                   .queries = invert.queries,
                   .begins = invert.begins,
                   .segments = invert.segments,
                   .partials = invert.partials,
                   .full_segments = pairs / segment,
                   .max_segments = pairs / segment + blocks,
                   .pieces = key_pieces};
    p.keys_heads = c.segment > 0 ? 1 : c.heads_kv;
  }

  // For either kernel.
  int64_t partial_floats() const {
    return std::max(2 * p.chosen_by.full_segments, blocks) * 64 * tile_row_size(c.dim_k, c.dim_v);
  }
};

}  // namespace nsa
