"""One step of training; on a GPU recorded once for each length and replayed, since launches bound small models."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .models import Decoder
from .tasks import Batch, logits_of

EAGER = 3  # steps of a length before one is recorded: they are steps like all others
CLIP = 1.0  # of the gradients' norm

Shapes = tuple[tuple[int, ...], ...]


class Step:
    """Loss, gradients, and AdamW's step for a batch; `rate` is set before each.

    The model's own random numbers (Reformer's rotations) are new in every replay.
    """

    def __init__(self, model: Decoder, device: torch.device, *, weight_decay: float, graphs: bool = True) -> None:
        self.model, self.device = model, device
        self.graphs = graphs and device.type == "cuda"
        self.not_recorded = ""  # why a recording failed; steps are then run one by one
        on_gpu = device.type == "cuda"
        self.optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=torch.zeros((), device=device) if on_gpu else 0.0,
            betas=(0.9, 0.95),
            weight_decay=weight_decay,
            fused=on_gpu,
            capturable=on_gpu,
        )
        self._shapes: Shapes = ()
        self._eager_steps = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: list[Tensor] = []
        self._loss = torch.zeros(())
        self._stream = torch.cuda.Stream(device) if on_gpu else None

    def set_rate(self, rate: float) -> None:
        """The learning rate of the next step; on a GPU without waiting for it."""
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def __call__(self, batch: Batch) -> Tensor:
        """The loss before the step, on the device."""
        if self._stream is None:
            return self._eager(batch)
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            loss = self._on_gpu(batch, self._stream)
        current.wait_stream(self._stream)
        return loss

    def _eager(self, batch: Batch) -> Tensor:
        loss = F.cross_entropy(logits_of(self.model, batch).flatten(0, 1), batch.targets.flatten())
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        return loss.detach()

    def _on_gpu(self, batch: Batch, stream: torch.cuda.Stream) -> Tensor:
        tensors = [t for t in (batch.tokens, batch.targets, batch.positions) if t is not None]
        shapes = tuple(tuple(t.shape) for t in tensors)
        if shapes != self._shapes:
            self._shapes, self._eager_steps, self._graph = shapes, 0, None
        if self.graphs and self._graph is None and self._eager_steps >= EAGER:
            self._record(tensors, stream)
        if self._graph is None:
            self._eager_steps += 1
            return self._eager(batch)
        for own, given in zip(self._inputs, tensors, strict=True):
            own.copy_(given)
        self._graph.replay()
        return self._loss.clone()

    def _record(self, tensors: list[Tensor], stream: torch.cuda.Stream) -> None:
        """Record a step without doing it; leave `graphs` off, with the reason, where that fails."""
        self._inputs = [t.clone() for t in tensors]
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=stream):
                self._loss = self._eager(Batch(*self._inputs))
            self._graph = graph
        except RuntimeError as error:
            self.graphs, self.not_recorded = False, str(error)
