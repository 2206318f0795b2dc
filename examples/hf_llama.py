"""Llama of Hugging Face transformers with Native Sparse Attention in place of its self-attention.

Trains a small model on the text of this file, saves, loads and samples from it. `nsa_torch.integrations.transformers`
has the models, and `use_nsa`, which makes one of a dense model.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from nsa_torch.integrations.transformers import NSALlamaConfig, NSALlamaForCausalLM


def train(model: NSALlamaForCausalLM, data: Tensor, steps: int, length: int) -> None:
    """Fit the model to tokens (N,) int64, printing the loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(steps):
        starts = torch.randint(len(data) - length, (8,)).tolist()
        batch = torch.stack([data[start : start + length] for start in starts])
        loss = model(batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == steps - 1:
            print(f"step {step:4d}  loss {loss.item():.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--length", type=int, default=256, help="tokens of a training sequence")
    parser.add_argument("--new-tokens", type=int, default=200)
    options = parser.parse_args()
    torch.manual_seed(0)

    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    sparse = {"block_size": 16, "block_stride": 8, "select_size": 16, "num_selected": 6, "window": 64}
    tokens = {"vocab_size": 256, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    model = NSALlamaForCausalLM(NSALlamaConfig(num_key_value_heads=2, **sizes, **sparse, **tokens))
    train(model, torch.tensor(list(Path(__file__).read_bytes())), options.steps, options.length)

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([list(prompt.rjust(14, b"\0")) for prompt in (b"class NSALlama", b"def ")])
    out = model.generate(ids, attention_mask=(ids != 0).long(), max_new_tokens=options.new_tokens, do_sample=True)
    for row in out.tolist():
        print("-" * 40, bytes(row).lstrip(b"\0").decode(errors="replace"), sep="\n")


if __name__ == "__main__":
    main()
