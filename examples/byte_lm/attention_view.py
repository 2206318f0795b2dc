"""What a trained model attends to: the blocks its queries read and the gates they open."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nsa_torch import NSAAttention

from .model import ByteTransformer


@dataclass(frozen=True)
class AttentionView:
    """Of one text of T bytes, a list entry a layer.

    block_indices: int32 (T, Hkv, n), -1 for none.
    gates: float32 (T, Hq, 3), in the order compressed, selected, window.
    """

    block_indices: list[Tensor]
    gates: list[Tensor]
    kv_head: int
    select_size: int
    num_initial: int
    num_local: int

    def gate_means(self) -> list[list[float]]:
        """Mean gate of every layer and branch."""
        return [gates.mean(dim=(0, 1)).tolist() for gates in self.gates]


@torch.no_grad()
def view_attention(model: ByteTransformer, text: Tensor, kv_head: int = 0) -> AttentionView:
    """Run text (T,) int64 through a model whose attention is NSA; note what each layer chose."""
    chosen: list[Any] = []

    def note(layer: nn.Module, arguments: tuple[Tensor, ...], keywords: dict[str, Any]) -> None:
        assert isinstance(layer, NSAAttention)
        chosen.append(layer.choices(arguments[0]))

    attentions = [layer.attention for layer in model.layers]
    hooks = [a.register_forward_pre_hook(note, with_kwargs=True) for a in attentions]
    try:
        model(text[None].to(model.embedding.weight.device))
    finally:
        for hook in hooks:
            hook.remove()
    return AttentionView(
        block_indices=[choices.block_indices[0].cpu() for choices in chosen],
        gates=[choices.gates[0].float().cpu() for choices in chosen],
        kv_head=kv_head,
        select_size=attentions[0].select_size,
        num_initial=attentions[0].num_initial,
        num_local=attentions[0].num_local,
    )
