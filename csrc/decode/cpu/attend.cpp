// A decoding step on the CPU: a task for each sequence and KV head.
#include <ATen/Dispatch.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "decode/call.h"
#include "host/cpu/parallel.h"

namespace nsa::cpu {
namespace {

template <typename Scalar>
using Wide = std::conditional_t<std::is_same_v<Scalar, double>, double, float>;

// Rows of one branch's pages, of one KV head.
template <typename Scalar>
struct Pages {
  const at::Tensor& k;
  const at::Tensor& v;
  const at::Tensor table;  // contiguous
  int64_t head;

  int64_t page_of(int64_t sequence, int64_t row) const {
    const int64_t index = row / k.size(1);
    const int64_t page = table.const_data_ptr<int32_t>()[sequence * table.size(1) + index];
    TORCH_CHECK_VALUE(page >= 0 && page < k.size(0), "block_table must name pages of the pool, which has ", k.size(0),
                      ", got ", page, " for page ", index, " of sequence ", sequence);
    return page;
  }
  static const Scalar* at(const at::Tensor& x, int64_t page, int64_t row, int64_t head) {
    return x.const_data_ptr<Scalar>() + page * x.stride(0) + row * x.stride(1) + head * x.stride(2);
  }
};

// One query of one KV head's group.
template <typename Scalar>
struct Query {
  using W = Wide<Scalar>;
  int64_t group;
  std::vector<W> q;    // (G, Dk), times the scale
  std::vector<W> out;  // (G, Dv)
  std::vector<W> scores;

  // Attends to the rows that `row_of(i)` names, i < count; adds to `out` by the gates. `scores` are the probabilities.
  template <typename RowOf>
  void attend(const Pages<Scalar>& pages, int64_t sequence, int64_t count, const W* gates, const RowOf& row_of) {
    const int64_t dim_k = pages.k.size(3), dim_v = pages.v.size(3);
    scores.assign(group * count, W(0));
    std::vector<const Scalar*> values(count);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = row_of(i);
      const int64_t page = pages.page_of(sequence, row);
      const Scalar* const key = Pages<Scalar>::at(pages.k, page, row % pages.k.size(1), pages.head);
      values[i] = Pages<Scalar>::at(pages.v, page, row % pages.k.size(1), pages.head);
      for (int64_t g = 0; g < group; ++g) {
        W sum = 0;
        for (int64_t c = 0; c < dim_k; ++c) {
          sum += q[g * dim_k + c] * static_cast<W>(key[c]);
        }
        scores[g * count + i] = sum;
      }
    }
    for (int64_t g = 0; g < group && count > 0; ++g) {
      W* const of_head = scores.data() + g * count;
      const W highest = *std::max_element(of_head, of_head + count);
      W total = 0;
      for (int64_t i = 0; i < count; ++i) {
        total += of_head[i] = std::exp(of_head[i] - highest);
      }
      for (int64_t i = 0; i < count; ++i) {
        of_head[i] /= total;
        const W weight = gates[g] * of_head[i];
        for (int64_t c = 0; c < dim_v; ++c) {
          out[g * dim_v + c] += weight * static_cast<W>(values[i][c]);
        }
      }
    }
  }

  // The blocks to read, ascending, from the probabilities of `count` compressed keys.
  std::vector<int64_t> choose(const DecodeOptions& o, int64_t count, int64_t position) const {
    const int64_t own_block = position / o.select_size;
    const BlockOverlap overlap{o.blocks.block_size / o.blocks.block_stride, o.select_size / o.blocks.block_stride};
    std::vector<W> importance(own_block + 1, W(0));
    for (int64_t j = 0; j <= own_block; ++j) {
      for (int64_t m = overlap.first(j); m < std::min(overlap.end(j), count); ++m) {
        for (int64_t g = 0; g < group; ++g) {
          importance[j] += scores[g * count + m] * static_cast<W>(overlap.count(m, j));
        }
      }
      if (o.forced.contains(j, own_block)) {
        importance[j] = std::numeric_limits<W>::infinity();
      } else if (std::isnan(importance[j])) {
        importance[j] = W(-1);  // counts as the lowest
      }
    }
    std::vector<int64_t> blocks(own_block + 1);
    std::iota(blocks.begin(), blocks.end(), 0);
    std::stable_sort(blocks.begin(), blocks.end(), [&](int64_t a, int64_t b) { return importance[a] > importance[b]; });
    blocks.resize(std::min<int64_t>(o.num_selected, own_block + 1));
    std::sort(blocks.begin(), blocks.end());
    return blocks;
  }
};

struct Place {
  int64_t sequence;
  int64_t batch;  // of q, gates and out: 0 when packed
  int64_t token;
  int64_t position;
  int64_t head_kv;
};

template <typename Scalar>
void attend_query(const DecodeInputs& in, const DecodeOptions& o, const at::Tensor& q, const at::Tensor& gates,
                  const at::Tensor& out, const Place& at) {
  using W = Wide<Scalar>;
  const int64_t group = q.size(2) / in.keys[0].size(2), dim_k = q.size(3), dim_v = out.size(3);
  Query<Scalar> query{group, std::vector<W>(group * dim_k), std::vector<W>(group * dim_v, W(0)), {}};
  std::array<std::vector<W>, 3> gate;
  for (int64_t g = 0; g < group; ++g) {
    const int64_t head = at.head_kv * group + g;
    const Scalar* const from =
        q.const_data_ptr<Scalar>() + at.batch * q.stride(0) + at.token * q.stride(1) + head * q.stride(2);
    for (int64_t c = 0; c < dim_k; ++c) {
      query.q[g * dim_k + c] = static_cast<W>(from[c]) * static_cast<W>(o.scale);
    }
    for (int branch = 0; branch < 3; ++branch) {
      gate[branch].push_back(gates.const_data_ptr<W>()[at.batch * gates.stride(0) + at.token * gates.stride(1) +
                                                       head * gates.stride(2) + branch]);
    }
  }
  if (at.position >= 0) {
    const auto pages = [&](int branch) {
      return Pages<Scalar>{in.keys[branch], in.values[branch], in.tables[branch], at.head_kv};
    };
    const int64_t shift = o.blocks.block_size / o.blocks.block_stride - 1;
    const int64_t compressed = o.blocks(at.position).end;
    query.attend(pages(0), at.sequence, compressed, gate[0].data(), [&](int64_t i) { return i + shift; });
    const std::vector<int64_t> blocks = query.choose(o, compressed, at.position);
    const int64_t listed = static_cast<int64_t>(blocks.size()) * o.select_size;
    const int64_t past = (blocks.back() + 1) * o.select_size - 1 - at.position;
    query.attend(pages(1), at.sequence, listed - std::max<int64_t>(past, 0), gate[1].data(),
                 [&](int64_t i) { return blocks[i / o.select_size] * o.select_size + i % o.select_size; });
    const KeyRange seen = WindowRange{o.window}(at.position);
    query.attend(pages(2), at.sequence, seen.end - seen.begin, gate[2].data(),
                 [&](int64_t i) { return seen.begin + i; });
  }
  for (int64_t g = 0; g < group; ++g) {
    Scalar* const to = out.mutable_data_ptr<Scalar>() + at.batch * out.stride(0) + at.token * out.stride(1) +
                       (at.head_kv * group + g) * out.stride(2);
    for (int64_t c = 0; c < dim_v; ++c) {
      to[c] = static_cast<Scalar>(query.out[g * dim_v + c]);
    }
  }
}

at::Tensor unit_stride(const at::Tensor& x) { return x.size(-1) <= 1 || x.stride(-1) == 1 ? x : x.contiguous(); }

// Every query of every KV head, with its place.
std::vector<Place> places_of(const DecodeInputs& in) {
  const at::Tensor lengths = in.cache_seqlens.contiguous();
  const OptionalTensor cumulative =
      in.cu_seqlens_q.has_value() ? OptionalTensor(in.cu_seqlens_q->contiguous()) : std::nullopt;
  const int64_t capacity = in.tables[1].size(1) * in.keys[1].size(1);
  std::vector<Place> places;
  for (int64_t b = 0; b < lengths.numel(); ++b) {
    const int64_t length = lengths.const_data_ptr<int32_t>()[b];
    TORCH_CHECK_VALUE(length >= 0 && length <= capacity, "cache_seqlens must be between 0 and the ", capacity,
                      " tokens that block_table has room for, got ", length, " for sequence ", b);
    const int32_t* const begins = cumulative.has_value() ? cumulative->const_data_ptr<int32_t>() : nullptr;
    const int64_t first = begins != nullptr ? begins[b] : 0;
    const int64_t queries = begins != nullptr ? begins[b + 1] - first : in.q.size(1);
    TORCH_CHECK_VALUE(
        queries >= 0 && queries <= in.max_seqlen_q && first >= 0 && first + queries <= in.q.size(in.q.dim() - 3),
        "cu_seqlens_q must ascend within the tokens of q, by at most max_seqlen_q, ", in.max_seqlen_q, ", got ",
        queries, " for sequence ", b);
    for (int64_t i = 0; i < queries; ++i) {
      for (int64_t head = 0; head < in.keys[0].size(2); ++head) {
        places.push_back({b, begins != nullptr ? 0 : b, first + i, length - queries + i, head});
      }
    }
  }
  return places;
}

}  // namespace

void decode(const DecodeInputs& given, const DecodeOptions& options, const at::Tensor& out) {
  DecodeInputs in = given;
  for (int branch = 0; branch < 3; ++branch) {
    in.keys[branch] = unit_stride(in.keys[branch]);
    in.values[branch] = unit_stride(in.values[branch]);
    in.tables[branch] = in.tables[branch].contiguous();
  }
  const bool packed = in.cu_seqlens_q.has_value();
  const auto dense = [&](const at::Tensor& x) { return packed ? x.unsqueeze(0) : x; };
  const at::Tensor q = dense(unit_stride(in.q));
  const at::Tensor gates =
      dense(in.gates.to(in.q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat).contiguous());
  const at::Tensor result = dense(out);
  const std::vector<Place> places = places_of(in);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, in.q.scalar_type(), "nsa_attention_with_kvcache", [&] {
    for_each_task(static_cast<int64_t>(places.size()),
                  [&](int64_t i) { attend_query<scalar_t>(in, options, q, gates, result, places[i]); });
  });
}

}  // namespace nsa::cpu
