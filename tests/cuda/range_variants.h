const std::vector<Case> kCases = {
    {"cmp 1k", 1, 1024, 1024, 2, 16, 128, 128, 16, 31, 0},
    {"window 1k", 1, 1024, 1024, 2, 16, 128, 128, 1, 0, 512},
    {"cmp 4k", 1, 4096, 4096, 4, 16, 128, 128, 16, 31, 0},
    {"causal 1k", 1, 1000, 1000, 1, 8, 128, 128, 1, 0, 0},
    {"cmp b2 777", 2, 777, 777, 2, 4, 128, 128, 16, 31, 0},
    {"window b2 777", 2, 777, 777, 2, 4, 128, 128, 1, 0, 100},
    {"window 1", 1, 1, 1, 1, 16, 128, 128, 1, 0, 512},
    {"cmp 31", 1, 33, 33, 1, 16, 128, 128, 16, 31, 0},
    {"window q<k", 2, 67, 1531, 2, 16, 128, 128, 1, 0, 512},
    {"window q>k", 2, 500, 131, 2, 16, 128, 128, 1, 0, 64},
    {"cmp q<k", 1, 67, 4531, 2, 16, 128, 128, 16, 31, 0},
    {"width 96/72", 1, 700, 700, 2, 16, 96, 72, 1, 0, 512},
    {"padded", 1, 700, 700, 2, 16, 128, 128, 1, 0, 512, {}, {}, false, 8},
    {"packed window",
     1,
     2900,
     2900,
     2,
     16,
     128,
     128,
     1,
     0,
     512,
     {0, 781, 781, 782, 2048, 2900},
     {0, 781, 781, 782, 2048, 2900}},
    {"packed cmp",
     1,
     2900,
     2900,
     2,
     16,
     128,
     128,
     16,
     31,
     0,
     {0, 781, 781, 812, 2048, 2900},
     {0, 781, 781, 812, 2048, 2900}},
    {"packed short", 1, 64, 1500, 2, 8, 128, 128, 1, 0, 512, {0, 1, 2, 40, 64}, {0, 700, 712, 752, 1500}},
    {"poison window",
     1,
     2900,
     2900,
     2,
     16,
     128,
     128,
     1,
     0,
     512,
     {0, 781, 900, 1782, 2048, 2900},
     {0, 781, 900, 1782, 2048, 2900},
     true},
    {"poison cmp",
     1,
     2900,
     2900,
     2,
     16,
     128,
     128,
     16,
     31,
     0,
     {0, 781, 900, 1782, 2048, 2900},
     {0, 781, 900, 1782, 2048, 2900},
     true},
    {"poison used",
     1,
     2900,
     2900,
     2,
     16,
     128,
     128,
     1,
     0,
     512,
     {0, 700, 800, 1682, 1948, 2900},
     {0, 781, 900, 1782, 2048, 2900},
     true,
     0,
     {730, 100, 882, 200, 840}},
    {"poison used cmp",
     1,
     2900,
     2900,
     2,
     16,
     128,
     128,
     16,
     31,
     0,
     {0, 700, 800, 1682, 1948, 2788},
     {0, 781, 900, 1782, 2048, 2900},
     true,
     0,
     {730, 100, 882, 200, 840}},
};

template <typename Element, int kDimK, int kDimV, int kConsumers, int kKeys, int kStages, int kQStages>
void shape(const RangeForwardParams& p, cudaStream_t s) {
  launch_range_forward_shape<RangeForwardSm90Shape<Element, kDimK, kDimV, kConsumers, kKeys, kStages, kQStages>>(p, s);
}

template <typename Element, int kDimK, int kDimV>
void check_dims(const char* name) {
  std::printf("-- %s %d/%d\n", name, kDimK, kDimV);
  using Shape = ForwardSm90Shape<Element, kDimK, kDimV>;
  for (Case c : kCases) {
    c.dim_k = c.dim_k == 128 ? kDimK : kDimK - 24;
    c.dim_v = c.dim_v == 128 ? kDimV : kDimV - 8;
    Problem<Element> problem(c);
    check<Element>(problem, "kernel", launch_range_forward_shape<Shape>);
    if (!Shape::kSums) {
      continue;
    }
    c.gated = true;
    Problem<Element> gated(c);
    check<Element>(gated, "gated", launch_range_forward_shape<Shape>);
    gated.params.out.data = nullptr;
    check<Element>(gated, "sum alone", launch_range_forward_shape<Shape>);
  }
  for (const int group : {1, 2, 3, 5, 7, 8, 11, 12, 13, 14, 24, 32, 33, 48, 64}) {
    const std::string window = "window G " + std::to_string(group);
    const std::string cmp = "packed cmp G " + std::to_string(group);
    const std::vector<int32_t> cu = {0, 781, 781, 812, 2048, 2900};
    Problem<Element> of_window({window.c_str(), 2, 777, 777, 2, group, kDimK, kDimV, 1, 0, 300});
    check<Element>(of_window, "dispatch", dispatched<Element, kDimK, kDimV>);
    Problem<Element> of_cmp({cmp.c_str(), 1, 2900, 2900, 2, group, kDimK, kDimV, 4, 7, 0, cu, cu});
    check<Element>(of_cmp, "dispatch", dispatched<Element, kDimK, kDimV>);
  }
  print_tally("checked");
}

void run_checks() {
  check_dims<BFloat16, 128, 128>("bf16");
  check_dims<Half, 128, 128>("fp16");
  check_dims<BFloat16, 64, 64>("bf16");
  check_dims<Half, 64, 64>("fp16");
  check_dims<BFloat16, 192, 128>("bf16");
  check_dims<Half, 192, 128>("fp16");
}

template <typename Element, int kDimK, int kDimV>
void check_dispatch(const char* name) {
  const bool on_sm90 =
      kDimK <= 192 && runs_on_this_device(range_forward_sm90<ForwardSm90Shape<Element, 128, 128>>, name);
  std::printf("-- dispatch, from graphs: %s %d/%d, sm_90a code: %s\n", name, kDimK, kDimV, on_sm90 ? "yes" : "no");
  for (Case c : kCases) {
    c.dim_k = c.dim_k == 128 ? kDimK : kDimK - 24;
    c.dim_v = c.dim_v == 128 ? kDimV : kDimV - 8;
    Problem<Element> problem(c);
    check<Element>(problem, "captured", captured<Element>);
    problem.params.scale *= -1.f;
    check<Element>(problem, "negative", captured<Element>);
    problem.params.scale *= -1.f;
    problem.params.k.head_stride = problem.params.v.head_stride = 0;
    check<Element>(problem, "one head", captured<Element>);
  }
  print_tally("checked");
}

void run_dispatch() {
  check_dispatch<BFloat16, 64, 64>("bf16");
  check_dispatch<BFloat16, 128, 128>("bf16");
  check_dispatch<BFloat16, 192, 128>("bf16");
  check_dispatch<BFloat16, 256, 256>("bf16");
  check_dispatch<Half, 64, 64>("fp16");
  check_dispatch<Half, 128, 128>("fp16");
  check_dispatch<Half, 192, 128>("fp16");
  check_dispatch<Half, 256, 256>("fp16");
}

// Packed sequences of one length as a dense batch.
template <typename Element, int kDimK, int kDimV>
void as_dense(const RangeForwardParams& packed, cudaStream_t stream) {
  RangeForwardParams p = packed;
  Sequences& s = p.sequences;
  s.length_q = s.length_k = s.length_q / s.batch;
  s.cumulative_q = s.cumulative_k = s.cumulative_cmp = nullptr;
  p.num_keys /= s.batch;
  p.q.batch_stride = s.length_q * p.q.token_stride;
  p.out.batch_stride = s.length_q * p.out.token_stride;
  p.k.batch_stride = p.num_keys * p.k.token_stride;
  p.v.batch_stride = p.num_keys * p.v.token_stride;
  p.lse.batch_stride = s.length_q;
  launch_range_forward_shape<ForwardSm90Shape<Element, kDimK, kDimV>>(p, stream);
}

// The sum by a kernel of its own.
template <typename Element, int kDimK, int kDimV>
void sum_apart(const RangeForwardParams& p, cudaStream_t stream) {
  RangeForwardParams without = p;
  without.sum = {};
  launch_range_forward_shape<ForwardSm90Shape<Element, kDimK, kDimV>>(without, stream);
  const auto view = [&](const void* data) {
    TensorView of = p.out;
    of.data = const_cast<void*>(data);
    return of;
  };
  const Sequences& s = p.sequences;
  launch_combine_gates({.rows = {s.batch, s.length_q, s.heads_kv * s.group},
                        .gates = p.sum.gates,
                        .outs = {view(p.sum.others[0]), view(p.sum.others[1]), p.out},
                        .out = view(p.sum.out)},
                       kElementType<Element>, stream);
}
template <typename Element, int kDimK, int kDimV>
void sum_alone(const RangeForwardParams& p, cudaStream_t stream) {
  RangeForwardParams without = p;
  without.out.data = nullptr;
  launch_range_forward_shape<ForwardSm90Shape<Element, kDimK, kDimV>>(without, stream);
}

struct TimedCase {
  const char* what;
  int stride, first_seen, window;
  int sequences;  // of the packed ones, or 0: dense
  int group;
  bool gated;
};

template <typename Element, int kDimK, int kDimV>
void time_dims(const char* name, std::vector<std::pair<const char*, Launch>> shapes, const std::vector<int>& kilos,
               const std::vector<TimedCase>& cases) {
  std::printf("-- %s %d/%d, ms (TFLOP/s)\n", name, kDimK, kDimV);
  for (const int kilo : kilos) {
    for (const TimedCase& t : cases) {
      const std::string what = std::string(t.what) + " " + std::to_string(kilo) + "k";
      const int tokens = kilo * 1024;
      std::vector<int32_t> cu;
      for (int i = 0; t.sequences > 0 && i <= t.sequences; ++i) {
        cu.push_back(i * (tokens / t.sequences));
      }
      Problem<Element> problem({.name = what.c_str(),
                                .batch = 1,
                                .tokens_q = tokens,
                                .tokens_k = tokens,
                                .heads_kv = std::max(1, 64 / t.group),
                                .group = t.group,
                                .dim_k = kDimK,
                                .dim_v = kDimV,
                                .stride = t.stride,
                                .first_seen = t.first_seen,
                                .window = t.window,
                                .cu_q = cu,
                                .cu_k = cu,
                                .gated = t.gated});
      time_kernels<Element>(problem, shapes);
      for (const auto& [kernel, launch_kernel] : shapes) {
        check<Element>(problem, kernel, launch_kernel, 4096);
      }
    }
  }
  print_tally("checked");
}

const std::vector<TimedCase> kDense = {{"compressed", 16, 31, 0, 0, 16, false}, {"window", 1, 0, 512, 0, 16, false}};
const std::vector<TimedCase> kGated = {{"window and sum", 1, 0, 512, 0, 16, true}};
const std::vector<TimedCase> kPacked = {{"compressed, one sequence", 16, 31, 0, 1, 16, false},
                                        {"window, one sequence", 1, 0, 512, 1, 16, false},
                                        {"compressed, 8 sequences", 16, 31, 0, 8, 16, false},
                                        {"window, 8 sequences", 1, 0, 512, 8, 16, false}};

std::vector<TimedCase> with_group(const char* compressed, const char* window, int group) {
  return {{compressed, 16, 31, 0, 0, group, false}, {window, 1, 0, 512, 0, group, false}};
}

template <typename Element, int kDimK, int kDimV>
std::pair<const char*, Launch> chosen() {
  return {"kernel", launch_range_forward_shape<ForwardSm90Shape<Element, kDimK, kDimV>>};
}

void run_times() {
  const auto kernel = chosen<BFloat16, 128, 128>();
  const std::pair<const char*, Launch> sm80 = {"sm80", launch_range_forward_sm80<BFloat16, 128, 128>};
  time_dims<BFloat16, 128, 128>("bf16", {kernel, sm80}, {8, 64}, kDense);
  time_dims<BFloat16, 128, 128>("bf16, packed", {kernel, {"as a dense batch", as_dense<BFloat16, 128, 128>}}, {64},
                                kPacked);
  time_dims<BFloat16, 128, 128>(
      "bf16", {kernel, {"sum alone", sum_alone<BFloat16, 128, 128>}, {"sum apart", sum_apart<BFloat16, 128, 128>}},
      {8, 64}, kGated);
  for (const int group : {1, 4, 6, 8, 12, 24, 32, 33}) {
    const std::string compressed = "compressed, G " + std::to_string(group);
    const std::string window = "window, G " + std::to_string(group);
    const std::vector<std::pair<const char*, Launch>> kernels = {kernel, sm80};
    time_dims<BFloat16, 128, 128>("bf16", {kernels.begin(), kernels.end() - (group == 33 ? 0 : 1)}, {64},
                                  with_group(compressed.c_str(), window.c_str(), group));
  }
  time_dims<Half, 128, 128>("fp16", {chosen<Half, 128, 128>()}, {64}, kDense);
  time_dims<BFloat16, 64, 64>("bf16", {chosen<BFloat16, 64, 64>()}, {8, 64}, kDense);
  time_dims<BFloat16, 64, 64>("bf16", {chosen<BFloat16, 64, 64>(), {"sum apart", sum_apart<BFloat16, 64, 64>}}, {64},
                              kGated);
  time_dims<BFloat16, 192, 128>(
      "bf16", {chosen<BFloat16, 192, 128>(), {"2x112", shape<BFloat16, 192, 128, 2, 112, 2, 1>}}, {8, 64}, kDense);
}
