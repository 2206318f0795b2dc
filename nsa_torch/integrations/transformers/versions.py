"""Refuses versions of transformers that this integration does not know; imported before all else."""

from transformers import __version__

OLDEST = (5, 23)

if tuple(int(part) for part in __version__.split(".")[:2]) < OLDEST:
    wanted = ".".join(map(str, OLDEST))
    raise ImportError(f"nsa_torch.integrations.transformers needs transformers {wanted} or newer, got {__version__}")
