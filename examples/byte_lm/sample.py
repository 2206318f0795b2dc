"""Sampling text from a trained model, one byte a step, through its cache."""

from __future__ import annotations

import torch
from torch import Tensor

from .model import ByteTransformer


@torch.no_grad()
def sample(model: ByteTransformer, prompt: bytes, length: int, *, temperature: float, seed: int) -> bytes:
    """`length` bytes that follow `prompt`. Temperature 0 takes the likeliest byte each time."""
    if not length:
        return b""
    device = model.embedding.weight.device
    generator = torch.Generator().manual_seed(seed)
    cache = model.make_cache(1, len(prompt) + length)
    text = torch.tensor([list(prompt)], device=device)
    sampled: list[int] = []
    while True:
        sampled.append(choose(model(text, cache)[0, -1], temperature, generator))
        if len(sampled) == length:
            return bytes(sampled)
        text = torch.tensor([sampled[-1:]], device=device)


def choose(logits: Tensor, temperature: float, generator: torch.Generator) -> int:
    """One byte by the logits (256,)."""
    if temperature == 0:
        return int(logits.argmax())
    # On the CPU, so that one seed gives one text whatever the device.
    chances = torch.softmax(logits.double().cpu() / temperature, dim=-1)
    return int(torch.multinomial(chances, 1, generator=generator))
