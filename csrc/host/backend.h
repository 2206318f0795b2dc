// What the code that registers an op is instantiated for. Every backend runs the same checks and allocates the same
// results; only what fills them differs.
#pragma once

namespace nsa {

enum class Backend {
  kCpu,
  kCuda,  // in builds with CUDA
  kMeta,  // shapes only
};

}  // namespace nsa
