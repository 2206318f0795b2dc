"""One small call of every CUDA kernel, forward and backward: what the sanitizers watch (tools/sanitize_gpu.py).

python tools/small_run.py
python tools/small_run.py --no-16-bit-products    # compress multiplies in float32 alone

On Hopper cuBLAS multiplies 16-bit matrices by kernels that racecheck ends with an internal error of its own, and whose
writes initcheck does not see. Nor does it see what the copy engine writes: it runs over the portable kernels.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import nsa_torch

HALF, BFLOAT16, SINGLE = torch.float16, torch.bfloat16, torch.float32
Case = tuple[torch.dtype, int, int, int, int, list[int]]
# dtype, query heads, KV heads, Dk, Dv, and the lengths of packed sequences, or one dense length for a batch of two
CASES: list[Case] = [
    (BFLOAT16, 16, 1, 128, 128, [150]),
    (BFLOAT16, 6, 2, 64, 64, [70, 0, 33]),
    (HALF, 4, 2, 128, 128, [81, 40]),
    (HALF, 24, 1, 40, 24, [75]),
    (BFLOAT16, 2, 1, 192, 128, [90]),
    (BFLOAT16, 4, 2, 256, 256, [67, 5]),
    (HALF, 3, 1, 6, 4, [66]),
    (SINGLE, 4, 2, 40, 24, [70, 1, 33]),
    (SINGLE, 2, 2, 128, 128, [68]),
]
BLOCKS = {"block_size": 16, "block_stride": 8, "select_size": 32, "num_selected": 4, "window": 20}
# On Hopper its own kernels take these; elsewhere the portable ones.
HOPPER_CASES: list[Case] = [
    (BFLOAT16, 16, 1, 128, 128, [300]),
    (HALF, 16, 2, 64, 64, [170, 0, 1, 130]),
    (BFLOAT16, 8, 2, 192, 128, [140, 65]),
    (BFLOAT16, 16, 1, 128, 128, [64, 200]),
    (HALF, 12, 1, 128, 128, [100]),
]
HOPPER_BLOCKS = {"block_size": 32, "block_stride": 16, "select_size": 64, "num_selected": 4, "window": 90}
# Long enough that blocks of threads take several tiles, and that rings of buffers go round.
LONG_CASES: list[Case] = [
    (BFLOAT16, 64, 4, 128, 128, [600]),
    (HALF, 8, 2, 192, 128, [330, 65]),
]
LONG_BLOCKS = {"block_size": 8, "block_stride": 2, "select_size": 64, "num_selected": 4, "window": 90}


def normal(*size: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*size, device="cuda", dtype=dtype, requires_grad=True)


def run(
    given: dict[str, int], dtype: torch.dtype, heads: int, kv_heads: int, dk: int, dv: int, lengths: list[int]
) -> None:
    packed = len(lengths) > 1
    tokens = sum(lengths)
    rows = (tokens,) if packed else (2, tokens)
    packing = {}
    if packed:
        cumulative = torch.tensor([0, *lengths], device="cuda").cumsum(0).int()
        packing = {"cu_seqlens_k": cumulative}
    q = normal(*rows, heads, dk, dtype=dtype)
    k, v = normal(*rows, kv_heads, dk, dtype=dtype), normal(*rows, kv_heads, dv, dtype=dtype)
    gates = torch.rand(*rows, heads, 3, device="cuda", requires_grad=True)
    cos, sin = (torch.randn(tokens, 1, dk, device="cuda") for _ in range(2))
    turned = nsa_torch.rotate(q, cos, sin)
    size, stride = given["block_size"], given["block_stride"]
    weight, second = normal(8, size * dk, dtype=dtype), normal(dk, 8, dtype=dtype)
    blocks = {"block_size": size, "block_stride": stride}
    weights = {"w1": weight, "w2": second} if dtype == SINGLE or "--no-16-bit-products" not in sys.argv else {}
    k_cmp = nsa_torch.compress(k, **weights, **blocks, **packing)
    v_cmp = nsa_torch.compress(v, **blocks, **packing)
    if packed:
        packing["cu_seqlens_q"] = packing["cu_seqlens_k"]
    out = nsa_torch.nsa_attention(turned, k_cmp, v_cmp, k, v, k, v, gates, **given, **packing)
    windowed, lse = nsa_torch.window_attention(turned, k, v, window=given["window"], **packing)
    (out.sum() + windowed.sum() + lse.sum()).backward()
    torch.cuda.synchronize()
    for tensor in (q, k, v, gates, *weights.values()):
        assert tensor.grad is not None and tensor.grad.isfinite().all()


def main() -> None:
    torch.manual_seed(0)
    for given, cases in ((BLOCKS, CASES), (HOPPER_BLOCKS, HOPPER_CASES), (LONG_BLOCKS, LONG_CASES)):
        for case in cases:
            print(*case, flush=True)
            run(given, *case)


if __name__ == "__main__":
    main()
