// Which shapes tests/cuda/range_backward_query_sm90.cu checks and times.
template <typename Element, int kDimK, int kDimV, int... kNumbers>
void shape(const RangeBackwardParams& p, cudaStream_t s) {
  launch_range_backward_query_shape<RangeBackwardQuerySm90Shape<Element, kDimK, kDimV, kNumbers...>>(p, s);
}

// Through the dispatch, which must take it.
template <typename Element, int kDimK, int kDimV>
void dispatched(const RangeBackwardParams& p, cudaStream_t s) {
  if (!try_range_backward_query_sm90<Element, kDimK, kDimV>(p, s)) {
    std::printf("the dispatch refused: ");
  }
}

template <typename Element, int kDimK, int kDimV>
void check_dispatch(const char* name) {
  check_dims<Element, kDimK, kDimV>(name, {{"dispatch", dispatched<Element, kDimK, kDimV>}});
}

void run_checks() {
  check_dispatch<BFloat16, 128, 128>("bf16");
  check_dispatch<Half, 128, 128>("fp16");
  check_dispatch<BFloat16, 64, 64>("bf16");
  check_dispatch<Half, 64, 64>("fp16");
  check_dispatch<BFloat16, 192, 128>("bf16");
  check_dispatch<Half, 192, 128>("fp16");
}

void run_times() {
  // Consumers x keys a step.
  time_dims<BFloat16, 128, 128>("bf16",
                                {{"3x64", dispatched<BFloat16, 128, 128>},
                                 {"2x96", shape<BFloat16, 128, 128, 2, 96, 3, 3, 2>},
                                 {"2x128", shape<BFloat16, 128, 128, 2, 128, 3, 2, 2>}},
                                {8, 64});
  time_dims<Half, 128, 128>("fp16", {{"3x64", dispatched<Half, 128, 128>}}, {64});
  time_dims<BFloat16, 64, 64>(
      "bf16", {{"3x80", dispatched<BFloat16, 64, 64>}, {"3x96", shape<BFloat16, 64, 64, 3, 96, 6, 4, 4>}}, {64});
  time_dims<BFloat16, 192, 128>(
      "bf16", {{"2x80", dispatched<BFloat16, 192, 128>}, {"2x64", shape<BFloat16, 192, 128, 2, 64, 3, 2, 2>}}, {64});
}
