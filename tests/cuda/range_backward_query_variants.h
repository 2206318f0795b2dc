template <typename Element, int kDimK, int kDimV, int... kNumbers>
void shape(const RangeBackwardParams& p, cudaStream_t s) {
  launch_range_backward_query_shape<RangeBackwardQuerySm90Shape<Element, kDimK, kDimV, kNumbers...>>(p, s);
}
using B = BFloat16;
using H = Half;
const Variants kVariants = {
    {"r4", shape<B, 128, 128, 3, 64, 4, 3, 3>},  {"r3", shape<B, 128, 128, 3, 64, 3, 4, 4>}, {"r4k4v2", shape<B, 128, 128, 3, 64, 4, 4, 2>},
    {"2x96", shape<B, 128, 128, 2, 96, 3, 3, 2>}, {"2x128", shape<B, 128, 128, 2, 128, 3, 2, 2>}};
const Variants kHalf = {{"r4", shape<H, 128, 128, 3, 64, 4, 3, 3>}};
const Variants k64 = {{"3x96", shape<B, 64, 64, 3, 96, 6, 4, 4>}, {"3x80", shape<B, 64, 64, 3, 80, 6, 4, 4>}};
const Variants k192 = {{"2x64", shape<B, 192, 128, 2, 64, 3, 2, 2>}, {"2x80", shape<B, 192, 128, 2, 80, 2, 3, 2>}};

void run_checks() {
  check_dims<B, 128, 128>("bf16", kVariants);
  check_dims<H, 128, 128>("fp16", kHalf);
  check_dims<B, 64, 64>("bf16", k64);
  check_dims<B, 192, 128>("bf16", k192);
}
void run_times() {
  time_dims<B, 128, 128>("bf16", kVariants, {8, 64});
  time_dims<H, 128, 128>("fp16", kHalf, {64});
  time_dims<B, 64, 64>("bf16", k64, {64});
  time_dims<B, 192, 128>("bf16", k192, {64});
}
