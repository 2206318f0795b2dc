// Attention over listed blocks on the GPU: what host code may call.
#pragma once

#include <cuda_runtime_api.h>

#include "selected/params.h"

namespace nsa {

// float16 or bfloat16 on tensor cores, sm_80 and later; the forward has a kernel of its own for sm_90a. Rows of every
// tensor start at multiples of 16 bytes, and widths are multiples of 8, at most 256.
void launch_selected_forward(const SelectedForwardParams& params, ElementType type, cudaStream_t stream);
void launch_selected_backward(const SelectedBackwardParams& params, ElementType type, cudaStream_t stream);
// How the backward of 16-bit tensors is carried out on this GPU.
struct SelectedBackwardPlan {
  int32_t keys_heads;    // KV heads of a launch of the gradients of k and v by pieces (KeyPieces); 0: by segments
  int32_t handed_heads;  // KV heads at a time whose scores' gradients one kernel hands to the other, in a workspace of
  int64_t handed_bytes;  // so many bytes; 0 where none does
};
// Of the parameters it needs all but chosen_by (there only the number of blocks), partials, keys_heads and handed.
SelectedBackwardPlan selected_backward_plan(const SelectedBackwardParams& params, ElementType type);
// What params.partials of the backward must hold.
int64_t selected_partial_floats(const SelectedBackwardParams& params);

// float32, without tensor cores: any head dimensions up to 256, any strides whose last is 1.
void launch_selected_forward_plain(const SelectedForwardParams& params, cudaStream_t stream);
// Writes all of grad_q, grad_k and grad_v, also where nobody sees a key. Of chosen_by it reads queries and begins; it
// needs no partials.
void launch_selected_backward_plain(const SelectedBackwardParams& params, cudaStream_t stream);

// Turning the lists round. The caller allocates what InvertListsParams points at.
int64_t invert_lists_temporary_bytes(int64_t pairs, int64_t blocks);
void launch_invert_lists(const InvertListsParams& params, cudaStream_t stream);

}  // namespace nsa
