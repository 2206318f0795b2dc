const std::vector<int32_t> kCu = {0, 781, 781, 812, 1500, 1900};
const std::vector<Case> kCases = {
    {"1k", 1, 1024, 1024, 2, 16, 128, 128, 16},
    {"1k correlated", 1, 1000, 1000, 2, 16, 128, 128, 8, true},
    {"2 x 777", 2, 777, 777, 2, 8, 128, 128, 6},
    {"1 token", 1, 1, 1, 1, 16, 128, 128, 4},
    {"q<k", 2, 67, 931, 2, 16, 128, 128, 16},
    {"q>k", 2, 300, 131, 2, 16, 128, 128, 4},
    {"width 96/72", 1, 700, 700, 2, 16, 96, 72, 5},
    {"pieces", 1, 1024, 1024, 2, 16, 128, 128, 12, false, {}, {}, {}, 37},
    {"chunks", 1, 1024, 1024, 2, 16, 128, 128, 12, false, {}, {}, {}, 50, 100},
    {"packed", 1, 0, 0, 2, 16, 128, 128, 6, false, kCu, kCu},
    {"packed pieces", 1, 0, 0, 2, 16, 128, 128, 6, true, kCu, kCu, {}, 50},
    {"packed chunks", 1, 0, 0, 2, 16, 128, 128, 6, true, kCu, kCu, {}, 50, 333},
    {"packed used", 1, 0, 0, 2, 16, 128, 128, 6, false, {0, 700, 700, 731, 1200, 1500}, kCu, {730, 0, 31, 600, 333}},
};

template <typename Element, int kDimK, int kDimV>
constexpr Kernel kernel(const char* name) {
  return {name, launch_keys<SelectedKeysSm90Shape<Element, kDimK, kDimV>>};
}
template <typename Element, int kDimK, int kDimV, int kRows, int kStages>
constexpr Kernel variant(const char* name) {
  return {name, launch_keys<KeyGradientsSm90Shape<Element, kDimK, kDimV, kRows, kStages>>};
}

template <typename Element, int kDimK, int kDimV>
void check_dims(const char* name, const std::vector<Kernel>& kernels) {
  for (Case c : kCases) {
    c.dim_k = c.dim_k == 128 ? kDimK : kDimK - 24;
    c.dim_v = c.dim_v == 128 ? kDimV : kDimV - 8;
    for (const Extra extra : {kGate, kGradLse, kNeither}) {
      check<Element>(c, extra, kernels);
    }
  }
  for (const int group : {1, 4, 5, 7, 8, 12, 20, 24, 32, 48, 64}) {
    const std::string dense = "2 x 377, G " + std::to_string(group);
    const std::string packed = "packed, G " + std::to_string(group);
    check<Element>({dense.c_str(), 2, 377, 377, 2, group, kDimK, kDimV, 4}, kGate, kernels);
    check<Element>({packed.c_str(), 1, 0, 0, 1, group, kDimK, kDimV, 5, false, kCu, kCu}, kGate, kernels);
    if (kDimK == 128) {  // the tiles of 64 / 128 too
      check<Element>({dense.c_str(), 2, 377, 377, 2, group, 64, kDimV, 4}, kGate, kernels);
    }
  }
  std::printf("%s %d/%d checked: %d right, %d wrong, %d fall back; largest error of the right ones %.1e\n", name, kDimK,
              kDimV, right, wrong, left_out, largest_error);
  right = wrong = left_out = 0;
  largest_error = 0;
}

template <typename Element, int kDimK, int kDimV>
void time_dims(const char* name, std::vector<Kernel> kernels) {
  std::printf("-- %s %d/%d, ms (distance from sm80)\n", name, kDimK, kDimV);
  kernels.push_back({"sm80", launch_selected_backward_keys_sm80<Element, kDimK, kDimV>});
  for (const int64_t kilo : {8, 64}) {
    for (const bool correlated : {false, true}) {
      const std::string title = std::to_string(kilo) + (correlated ? "k correlated" : "k random");
      time_kernels<Element>({title.c_str(), 1, kilo * 1024, kilo * 1024, 4, 16, kDimK, kDimV, 16, correlated}, kernels);
    }
  }
}

void run_checks() {
  check_dims<BFloat16, 128, 128>("bf16", {kernel<BFloat16, 128, 128>("sm90")});
  check_dims<BFloat16, 64, 64>("bf16", {kernel<BFloat16, 64, 64>("sm90")});
  check_dims<BFloat16, 192, 128>("bf16", {kernel<BFloat16, 192, 128>("sm90")});
}

void run_times() {
  time_dims<BFloat16, 128, 128>("bf16", {kernel<BFloat16, 128, 128>("48"), variant<BFloat16, 128, 128, 32, 4>("32")});
}

void run_profile() {
  Problem<BFloat16> problem({"8k random", 1, 8192, 8192, 4, 16, 128, 128, 16}, kGate, false);
  Device<float> partials(problem.partial_floats());
  problem.p.partials = partials.data;
  kernel<BFloat16, 128, 128>("sm90").launch(problem.p, nullptr);
  check_cuda(cudaDeviceSynchronize(), "profile");
}
