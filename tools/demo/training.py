"""Gradient descent: reading books, and until a batch is known by heart, for the base and for the adapters alike."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from smoa_serve.errors import SmoaError

from .data import IGNORED, Batch

LogitsOf = Callable[[Batch], Tensor]
"""Batch → logits [N, T, vocabulary], through whatever is being trained."""

Report = Callable[[int, str], None]
"""Called with (steps done, how it stands)."""
BESIDE = 0.25  # weight of what is read while something is learned by heart
NextBatch = Callable[[], Batch]
"""What is read beside what has to be known by heart."""


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to learn by heart.

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


def loss_of(logits_of: LogitsOf, batch: Batch) -> Tensor:
    """Mean of -ln(probability) over the batch's targets."""
    logits = logits_of(batch).float()
    return functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORED)


def read(
    logits_of: LogitsOf, parameters: Sequence[Tensor], passages: NextBatch, steps: int, rate: float, report: Report
) -> float:
    """Train on passages of a text, a new batch at every step.

    Args:
        logits_of: forward pass that `parameters` take part in.
        parameters: leaves that require gradients.
        passages: gives the next batch.
        steps: how many.
        rate: the learning rate, after a tenth of the steps; it falls to a tenth of itself at the end.
        report: called from time to time.

    Returns:
        The loss at the end, averaged over some steps.
    """
    optimizer = _optimizer(parameters, rate)
    mean = 0.0
    for step in range(1, steps + 1):
        _set_rate(optimizer, rate * min(10 * step / steps, 1 - 0.9 * step / steps))
        loss = loss_of(logits_of, passages())
        _take_step(optimizer, parameters, loss)
        mean = float(loss.detach()) if step == 1 else 0.95 * mean + 0.05 * float(loss.detach())
        if step % 10 == 0:
            report(step, f"loss {mean:.2f}")
    return mean


def learn(
    name: str,
    logits_of: LogitsOf,
    parameters: Sequence[Tensor],
    batch: Batch,
    schedule: Schedule,
    report: Report,
    beside: NextBatch | None = None,
) -> float:
    """Train until the batch is known by heart.

    Args:
        name: for the error message.
        logits_of: forward pass that `parameters` take part in.
        parameters: leaves that require gradients.
        batch: everything to learn.
        schedule: how.
        report: called at every check.
        beside: something else to read in every step, lest it is forgotten.

    Returns:
        The worst answer token's probability at the end.

    Raises:
        TrainingError: `max_steps` were not enough.
    """
    optimizer = _optimizer(parameters, schedule.learning_rate)
    worst = 0.0
    for step in range(1, schedule.max_steps + 1):
        _set_rate(optimizer, schedule.rate(step))
        loss = loss_of(logits_of, _part(batch, schedule.batch_size))
        if beside is not None:
            loss = loss + BESIDE * loss_of(logits_of, beside())
        _take_step(optimizer, parameters, loss)
        if step % schedule.check_every == 0:
            worst = worst_probability(logits_of, batch)
            report(step, f"least sure token {worst:6.1%}")
            if worst >= schedule.confidence:
                return worst
    raise TrainingError(
        f"{name}: after {schedule.max_steps} steps the worst answer token has probability {worst:.3f}, "
        f"{schedule.confidence} is needed"
    )


def _optimizer(parameters: Sequence[Tensor], rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0, betas=(0.9, 0.98))


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def _take_step(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], loss: Tensor) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


def _part(batch: Batch, size: int | None) -> Batch:
    if size is None:
        return batch
    return batch.rows(torch.randperm(len(batch.ids))[:size])
