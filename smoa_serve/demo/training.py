"""Gradient descent until a batch is known by heart, for the base and for the adapters alike."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import SmoaError
from .data import IGNORED, Batch

LogitsOf = Callable[[Batch], Tensor]
"""Batch → logits [N, T, vocabulary], through whatever is being trained."""

Report = Callable[[int, float], None]
"""Called with (steps done, worst answer token's probability)."""


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to learn.

    Attributes:
        max_steps: give up after these.
        learning_rate: after a short warm-up; Adam. Falls to zero over the last `decay` of the steps.
        batch_size: conversations a step; None takes all.
        check_every: steps between checks of the whole batch.
        confidence: done when every answer token has at least this probability: room for bfloat16 serving.
    """

    max_steps: int
    learning_rate: float
    batch_size: int | None = None
    check_every: int = 10
    confidence: float = 0.97
    warmup: int = 10
    decay: float = 0.7

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 1."""
        falling = (self.max_steps - step + 1) / (self.max_steps * self.decay)
        return self.learning_rate * min(1.0, step / self.warmup, falling)


class TrainingError(SmoaError):
    """The demo's models did not learn their answers."""


@torch.no_grad()
def worst_probability(logits_of: LogitsOf, batch: Batch) -> float:
    """The least probability of any answer token; above 0.5 greedy decoding gives every answer back."""
    probabilities = logits_of(batch).float().softmax(-1)
    wanted = probabilities.gather(-1, batch.targets.clamp_min(0)[..., None])[..., 0]
    return float(wanted[batch.targets != IGNORED].min())


def learn(
    name: str, logits_of: LogitsOf, parameters: Sequence[Tensor], batch: Batch, schedule: Schedule, report: Report
) -> float:
    """Train until the batch is known by heart.

    Args:
        name: for the error message.
        logits_of: forward pass that `parameters` take part in.
        parameters: leaves that require gradients.
        batch: everything to learn.
        schedule: how.
        report: called at every check.

    Returns:
        The worst answer token's probability at the end.

    Raises:
        TrainingError: `max_steps` were not enough.
    """
    optimizer = torch.optim.AdamW(parameters, lr=schedule.learning_rate, weight_decay=0.0, betas=(0.9, 0.98))
    worst = 0.0
    for step in range(1, schedule.max_steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step)
        part = _part(batch, schedule.batch_size)
        logits = logits_of(part).float()
        loss = functional.cross_entropy(logits.flatten(0, 1), part.targets.flatten(), ignore_index=IGNORED)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % schedule.check_every == 0:
            worst = worst_probability(logits_of, batch)
            report(step, worst)
            if worst >= schedule.confidence:
                return worst
    raise TrainingError(
        f"{name}: after {schedule.max_steps} steps the worst answer token has probability {worst:.3f}, "
        f"{schedule.confidence} is needed"
    )


def _part(batch: Batch, size: int | None) -> Batch:
    if size is None:
        return batch
    return batch.rows(torch.randperm(len(batch.ids))[:size])
