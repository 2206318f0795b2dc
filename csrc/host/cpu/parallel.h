// Independent tasks over ATen's threads, taken one after another as threads come free: causal work is uneven.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace nsa::cpu {

template <typename Task>
void for_each_task(int64_t count, const Task& task) {
  const int64_t workers = std::min<int64_t>(count, at::get_num_threads());
  std::atomic<int64_t> next{0};
  at::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    for (int64_t i = next.fetch_add(1); i < count; i = next.fetch_add(1)) {
      task(i);
    }
  });
}

}  // namespace nsa::cpu
