// Calls of this folder's ops through the dispatcher.
#pragma once

#include "host/options.h"

namespace nsa {

struct SelectedBranch {
  static BranchForward forward;
  static BranchBackward backward;
};

}  // namespace nsa
