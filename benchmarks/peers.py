"""What the ops are compared with, in the same process: dense attention of torch, and others' sparse attention.

A peer is a function of (q, k, v), each (B, T, H, D), to out; one that does not run here says why in `notes`.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable
from importlib import metadata

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from problems import Problem

Peer = Callable[[Tensor, Tensor, Tensor], Tensor]

BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "fa2": SDPBackend.FLASH_ATTENTION}


def sdpa(backend: SDPBackend, *, gqa: bool) -> Peer:
    """torch's dense causal attention by one backend; without gqa its K and V must have all heads."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads_first = (t.transpose(1, 2) for t in (q, k, v))
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=gqa).transpose(1, 2)

    return run


def fa4() -> Peer:
    """FlashAttention-4 of the package flash-attn-4: K and V in groups. ImportError where it is not installed."""
    flash_attn_func = importlib.import_module("flash_attn.cute").flash_attn_func

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = flash_attn_func(q, k, v, causal=True)
        return out[0] if isinstance(out, tuple) else out  # (out, lse) in some releases

    return run


def add_fa4(found: dict[str, tuple[Peer, list[Tensor]]], tensors: list[Tensor], notes: dict[str, str]) -> None:
    """FlashAttention-4 among the peers `found`, or why it is not in `notes`."""
    if importlib.util.find_spec("flash_attn") is None:
        notes["fa4"] = "not installed"
        return
    try:
        peer = fa4()
    except Exception as error:  # another release of flash_attn, or a package that it needs is missing
        notes["fa4"] = f"not run: {in_a_line(error)}"
        return
    reason = refusal(peer, [t[:, :256] for t in tensors])
    if reason is not None:
        notes["fa4"] = f"not run: {reason}"
        return
    notes["fa4"] = f"flash-attn-4 {version('flash-attn-4')}, K and V in groups"
    found["fa4"] = peer, tensors


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "of unknown version"


def dense_peers(problem: Problem, notes: dict[str, str]) -> dict[str, tuple[Peer, list[Tensor]]]:
    """The dense peers that run on this problem, each with its q, k, v: in groups, or expanded where it must be."""
    shape = problem.shape
    tensors = [t.detach() for t in (problem.q, problem.keys[1], problem.values[1])]
    small = [t[:, :256] for t in tensors]
    found: dict[str, tuple[Peer, list[Tensor]]] = {}
    for name, backend in BACKENDS.items():
        for gqa in (True, False):
            peer = sdpa(backend, gqa=gqa)
            reason = refusal(peer, small if gqa else expanded(small, shape.group))
            if reason is None:
                notes[name] = "K and V in groups (enable_gqa)" if gqa else "K and V expanded to all query heads"
                found[name] = peer, tensors if gqa else expanded(tensors, shape.group)
                break
            notes[name] = f"not run: {reason}"
    add_fa4(found, tensors, notes)
    return found


def expanded(tensors: list[Tensor], group: int) -> list[Tensor]:
    """K and V with a copy for every query head."""
    q, *rest = tensors
    return [q, *(t.repeat_interleave(group, dim=2) for t in rest)]


def refusal(peer: Peer, tensors: list[Tensor]) -> str | None:
    """Why the peer does not take these tensors, in a line; None when it does, forward and backward."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            peer(*leaves).sum().backward()
    except Exception as error:  # whatever a peer does not run on
        return in_a_line(error)
    return None


def in_a_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:120]


def flex_window(problem: Problem, notes: dict[str, str]) -> Peer | None:
    """flex_attention, compiled, with a block mask of the window."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    window, length = problem.shape.window, problem.shape.seqlen_k

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key > query - window)

    compiled = torch.compile(flex_attention)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads_first = (t.transpose(1, 2) for t in (q, k, v))
        return compiled(*heads_first, block_mask=mask, enable_gqa=True).transpose(1, 2)

    tensors = [problem.q, problem.keys[2], problem.values[2]]
    try:
        mask = create_block_mask(visible, None, None, length, length, device=str(problem.q.device), _compile=True)
    except Exception as error:  # whatever the compiler does not run on
        notes["flex"] = f"not run: {in_a_line(error)}"
        return None
    reason = refusal(run, tensors)
    notes["flex"] = "compiled, with a block mask of the window" if reason is None else f"not run: {reason}"
    return run if reason is None else None


def other_nsa(problem: Problem, notes: dict[str, str]) -> Callable[[], Tensor] | None:
    """flash-linear-attention's NSA, where installed: one K and V for all branches, compressed by means of l' keys."""
    try:
        parallel_nsa = importlib.import_module("fla.ops.nsa").parallel_nsa
    except (ImportError, AttributeError):
        notes["fla"] = "not installed"
        return None
    shape = problem.shape
    gates = problem.gates.detach()
    g_cmp, g_slc, g_win = (gates[..., b].contiguous() for b in range(3))
    # Its window branch needs the package flash_attn.
    window = shape.window if importlib.util.find_spec("flash_attn") else 0

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        options = {"block_counts": shape.num_selected, "block_size": shape.select_size, "window_size": window}
        out = parallel_nsa(q, k, v, g_cmp=g_cmp, g_slc=g_slc, g_swa=g_win if window else None, **options)
        return out[0] if isinstance(out, tuple) else out

    reason = refusal(run, [problem.q, problem.keys[1], problem.values[1]])
    if reason is not None:
        notes["fla"] = f"not run: {reason}"
        return None
    notes["fla"] = "flash-linear-attention " + ("with" if window else "without") + " its window branch"
    return lambda: run(problem.q, problem.keys[1], problem.values[1])
