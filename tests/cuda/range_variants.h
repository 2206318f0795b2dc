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
    {"packed window", 1, 2900, 2900, 2, 16, 128, 128, 1, 0, 512, {0, 781, 781, 782, 2048, 2900}, {0, 781, 781, 782, 2048, 2900}},
    {"packed cmp", 1, 2900, 2900, 2, 16, 128, 128, 16, 31, 0, {0, 781, 781, 812, 2048, 2900}, {0, 781, 781, 812, 2048, 2900}},
    {"packed short", 1, 64, 1500, 2, 8, 128, 128, 1, 0, 512, {0, 1, 2, 40, 64}, {0, 700, 712, 752, 1500}},
    {"poison window", 1, 2900, 2900, 2, 16, 128, 128, 1, 0, 512, {0, 781, 900, 1782, 2048, 2900}, {0, 781, 900, 1782, 2048, 2900}, true},
    {"poison cmp", 1, 2900, 2900, 2, 16, 128, 128, 16, 31, 0, {0, 781, 900, 1782, 2048, 2900}, {0, 781, 900, 1782, 2048, 2900}, true},
};
const Case kCmp64k = {"compressed 64k", 1, 65536, 65536, 4, 16, 128, 128, 16, 31, 0};
const Case kWin64k = {"window 64k", 1, 65536, 65536, 4, 16, 128, 128, 1, 0, 512};
const Case kCmp8k = {"compressed 8k", 1, 8192, 8192, 4, 16, 128, 128, 16, 31, 0};
const Case kWin8k = {"window 8k", 1, 8192, 8192, 4, 16, 128, 128, 1, 0, 512};

template <int kConsumers, int kKeys>
void shape(const RangeForwardParams& p, cudaStream_t s) {
  launch_range_forward_shape<RangeForwardSm90Shape<BFloat16, 128, 128, kConsumers, kKeys, 2>>(p, s);
}

void run_checks() {
  for (const Case& c : kCases) {
    Problem<BFloat16> problem(c);
    check<BFloat16>(problem, "2x128", shape<2, 128>);
    check<BFloat16>(problem, "2x176", shape<2, 176>);
  }
  {
    Problem<BFloat16> problem(kCases[2]);
    check<BFloat16>(problem, "3x80", shape<3, 80>);
  }
}
void run_times() {
  for (const Case& c : {kCmp64k, kWin64k, kCmp8k, kWin8k}) {
    Problem<BFloat16> problem(c);
    time_kernel<BFloat16>(problem, "2x128", shape<2, 128>);
    time_kernel<BFloat16>(problem, "2x144", shape<2, 144>);
    time_kernel<BFloat16>(problem, "2x160", shape<2, 160>);
    time_kernel<BFloat16>(problem, "2x176", shape<2, 176>);
    time_kernel<BFloat16>(problem, "3x80", shape<3, 80>);
    time_kernel<BFloat16>(problem, "sm80", launch_range_forward_sm80<BFloat16, 128, 128>, 3);
    check<BFloat16>(problem, "2x176", shape<2, 176>, 4096);
  }
}
