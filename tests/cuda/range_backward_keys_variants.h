const std::vector<int32_t> kFive = {0, 781, 781, 812, 2048, 2900};
const std::vector<int32_t> kPoisoned = {0, 781, 900, 1782, 2048, 2900};
const std::vector<Case> kCases = {
    {"cmp 1k", 1, 1024, 1024, 2, 16, 128, 128, 16, 31, 0},
    {"window 1k", 1, 1024, 1024, 2, 16, 128, 128, 1, 0, 512},
    {"causal 700", 1, 700, 700, 1, 8, 128, 128, 1, 0, 0},
    {"cmp 4k", 1, 4096, 4096, 1, 16, 128, 128, 16, 31, 0},
    {"cmp b2 777", 2, 777, 777, 2, 4, 128, 128, 4, 7, 0},
    {"window b2 777", 2, 777, 777, 2, 4, 128, 128, 1, 0, 100},
    {"window 1", 1, 1, 1, 1, 16, 128, 128, 1, 0, 512},
    {"cmp 33", 1, 33, 33, 1, 16, 128, 128, 16, 31, 0},
    {"window q<k", 2, 67, 931, 2, 16, 128, 128, 1, 0, 512},
    {"window q>k", 2, 300, 131, 2, 16, 128, 128, 1, 0, 64},
    {"cmp q<k", 1, 67, 4531, 2, 16, 128, 128, 16, 31, 0},
    {"width 96/72", 1, 700, 700, 2, 16, 96, 72, 1, 0, 512},
    {"padded", 1, 700, 700, 2, 16, 128, 128, 1, 0, 512, {}, {}, false, 8},
    {"packed window", 1, 2900, 2900, 1, 16, 128, 128, 1, 0, 512, kFive, kFive},
    {"packed cmp", 1, 2900, 2900, 1, 16, 128, 128, 16, 31, 0, kFive, kFive},
    {"packed short", 1, 64, 1500, 2, 8, 128, 128, 1, 0, 512, {0, 1, 2, 40, 64}, {0, 700, 712, 752, 1500}},
    {"poison window", 1, 2900, 2900, 1, 16, 128, 128, 1, 0, 512, kPoisoned, kPoisoned, true},
    {"poison cmp", 1, 2900, 2900, 1, 16, 128, 128, 16, 31, 0, kPoisoned, kPoisoned, true},
    {"poison used",
     1,
     2900,
     2900,
     1,
     16,
     128,
     128,
     1,
     0,
     512,
     {0, 700, 800, 1682, 1948, 2788},
     kPoisoned,
     true,
     0,
     {730, 100, 882, 200, 840}},
};

template <typename Element, int kDimK, int kDimV>
constexpr Kernel kernel(const char* name, bool many = false) {
  return {name, many ? many_splits : choose_range_keys_splits_sm90,
          launch_range_backward_keys_sm90<Element, kDimK, kDimV>};
}

template <typename Element, int kDimK, int kDimV>
void check_dims(const char* name) {
  const std::vector<Kernel> kernels = {kernel<Element, kDimK, kDimV>("sm90"),
                                       kernel<Element, kDimK, kDimV>("many", true)};
  Device<float> partials(int64_t{96} << 20);
  for (Case c : kCases) {
    c.dim_k = c.dim_k == 128 ? kDimK : kDimK - 24;
    c.dim_v = c.dim_v == 128 ? kDimV : kDimV - 8;
    for (const Extra extra : {kGate, kGradLse, kNeither}) {
      Problem<Element> problem(c, extra, true);
      for (const Kernel& kernel : kernels) {
        check(problem, kernel, partials);
      }
    }
  }
  for (const int group : {1, 2, 3, 5, 7, 8, 12, 20, 24, 32, 64}) {
    const std::string window = "window G " + std::to_string(group);
    const std::string cmp = "packed cmp G " + std::to_string(group);
    Problem<Element> of_window({window.c_str(), 2, 377, 377, 2, group, kDimK, kDimV, 1, 0, 300}, kGate, true);
    Problem<Element> of_cmp({cmp.c_str(), 1, 2900, 2900, 1, group, kDimK, kDimV, 16, 31, 0, kFive, kFive}, kGate, true);
    for (const Kernel& kernel : kernels) {
      check(of_window, kernel, partials);
      check(of_cmp, kernel, partials);
    }
  }
  std::printf("%s %d/%d checked: %d right, %d wrong; largest error of the right ones %.1e\n", name, kDimK, kDimV, right,
              wrong, largest_error);
  right = wrong = 0;
  largest_error = 0;
}

template <typename Element, int kDimK, int kDimV>
void time_dims(const char* name) {
  std::vector<Kernel> kernels = {kernel<Element, kDimK, kDimV>("sm90")};
  std::printf("-- %s %d/%d, ms (TFLOP/s of visible pairs, distance from sm80)\n", name, kDimK, kDimV);
  kernels.push_back({"sm80", sm80_splits, launch_range_backward_keys_sm80<Element, kDimK, kDimV>});
  Device<float> partials(int64_t{80} << 20);
  for (const int64_t kilo : {8, 64}) {
    const std::string cmp = "compressed " + std::to_string(kilo) + "k";
    const std::string window = "window " + std::to_string(kilo) + "k";
    const int64_t tokens = kilo * 1024;
    for (const bool compressed : {true, false}) {
      Problem<Element> problem(compressed ? Case{cmp.c_str(), 1, tokens, tokens, 4, 16, kDimK, kDimV, 16, 31, 0}
                                          : Case{window.c_str(), 1, tokens, tokens, 4, 16, kDimK, kDimV, 1, 0, 512},
                               kGate, false);
      const RangeSplits splits = choose_range_keys_splits_sm90(problem.params, multiprocessors("device"));
      std::printf("[%d splits of %d rows, %lld MB] ", splits.splits, splits.rows_per_split,
                  static_cast<long long>(splits.partial_floats >> 18));
      time_kernels(problem, kernels, partials);
    }
  }
}

void run_checks() {
  check_dims<BFloat16, 128, 128>("bf16");
  check_dims<Half, 128, 128>("fp16");
  check_dims<BFloat16, 64, 64>("bf16");
  check_dims<Half, 64, 64>("fp16");
  check_dims<BFloat16, 192, 128>("bf16");
  check_dims<Half, 192, 128>("fp16");
}

void run_times() {
  time_dims<BFloat16, 128, 128>("bf16");
  time_dims<Half, 128, 128>("fp16");
  time_dims<BFloat16, 64, 64>("bf16");
  time_dims<BFloat16, 192, 128>("bf16");
}

void run_profile() {
  Device<float> partials(int64_t{80} << 20);
  Problem<BFloat16> problem({"compressed 16k", 1, 16384, 16384, 4, 16, 128, 128, 16, 31, 0}, kGate, false);
  run(problem, kernel<BFloat16, 128, 128>("sm90"), partials);
  check_cuda(cudaDeviceSynchronize(), "profile");
}
