"""Does SMoA do what the paper says? LoRA, DoRA, HiRA, SMoA and SMoA with a random order at equal trainable parameters.

Every method gets the same search: one training per learning rate of one grid, on a seed of its own; the best of them
is then trained on other seeds.
"""

import os
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks import learning
from benchmarks.harness import Options, Row, of_kind, table
from benchmarks.learning import METHODS, SHUFFLED, SMOA, Fit, Result

GRID = (3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)  # learning rates, the same for every method
SEARCH_SEED = 0


@dataclass(frozen=True)
class Plan:
    """How much is run: seeds that are reported after the search, and steps of every kind of training."""

    seeds: int
    regression_steps: int
    dialect_steps: int
    pretraining_steps: int


def cases(options: Options) -> Plan:
    return Plan(1, 60, 5, 60) if options.quick else Plan(5, 400, 100, 500)


def measure(plan: Plan, options: Options) -> list[Row]:
    weight = learning.llm_like_weight(SEARCH_SEED)
    rank = learning.REGRESSION_RANK
    rows: list[Row] = [
        {"kind": "reach", "method": method, **learning.random_reach(weight, method, rank, plan.seeds)}
        for method in METHODS
    ]
    workers = len(os.sched_getaffinity(0))
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,)) as pool,
    ):
        base = Path(folder) / "base.pt"
        learnt = pool.submit(learning.pretrain, base, plan.pretraining_steps).result()
        tasks = [("regression", kind, rank, plan.regression_steps, learning.regression) for kind in learning.TARGETS]
        taught = partial(learning.dialect, base_file=base)
        tasks += [("dialect", kind, learning.CHARACTER_RANK, plan.dialect_steps, taught) for kind in learning.DIALECTS]
        for family, kind, rank, steps, task in tasks:
            found = _compare(pool, partial(task, kind), Fit("", rank, steps=steps), plan.seeds)
            rows += ({"kind": family, "task": kind, **row} for row in found)
        untouched = {kind: learning.held_out(learning.character_model(base), kind) for kind in learning.DIALECTS}
    return [*rows, {"kind": "base", "loss_of_its_own_dialect": learnt, **untouched}]


def _compare(pool: ProcessPoolExecutor, task: Callable[[Fit], Result], fit: Fit, seeds: int) -> Iterator[Row]:
    def submit(method: str, rate: float, seed: int) -> Future[Result]:
        return pool.submit(task, replace(fit, method=method, learning_rate=rate, seed=seed))

    searched = {(method, rate): submit(method, rate, SEARCH_SEED) for method in METHODS for rate in GRID}
    error = {key: _error(future.result()) for key, future in searched.items()}
    best = {method: min(GRID, key=lambda rate: error[method, rate]) for method in METHODS}
    others = range(SEARCH_SEED + 1, SEARCH_SEED + 1 + seeds)
    measured = {method: [submit(method, best[method], seed) for seed in others] for method in METHODS}
    for method in METHODS:
        results = [future.result() for future in measured[method]]
        errors = [_error(result) for result in results]
        row = {
            "method": method,
            "parameters": results[0].parameters,
            "learning_rate": best[method],
            "errors": errors,
            "mean": statistics.mean(errors),
            "spread": statistics.stdev(errors) if len(errors) > 1 else 0.0,
            "search": {f"{rate:g}": error[method, rate] for rate in GRID},
            "reach": learning.mean_reach(result.reach for result in results),
        }
        print({key: row[key] for key in ("method", "learning_rate", "mean", "spread")})
        yield row


def _error(result: Result) -> float:
    return result.error if result.error == result.error else float("inf")  # not a number: it diverged


def section(rows: Sequence[Row]) -> str:
    (base,) = of_kind(rows, "base")
    seeds = len(of_kind(rows, "regression")[0]["errors"])
    untouched = ", ".join(f"{base[task]:.2f} on “{task}”" for task in learning.DIALECTS)
    words = "seeds that the search did not see; in brackets the learning rate that the search chose."
    parts = [
        f"Mean ± standard deviation of {seeds} {words}",
        "### Regression: ‖ΔW − target‖ / ‖target‖",
        _comparison(of_kind(rows, "regression")),
        "### Dialects of a character model: loss on new sentences, nats per character",
        f"The untouched base has {base['loss_of_its_own_dialect']:.3f} on its own dialect, {untouched}.",
        _comparison(of_kind(rows, "dialect")),
        _paired(rows),
        "### What an update reaches, as shares of min(H_out, H_in)",
        _reach(rows),
    ]
    return "\n\n".join(parts)


def _of(rows: Sequence[Row], kind: str, method: str, task: str | None = None) -> Row:
    return next(row for row in of_kind(rows, kind) if row["method"] == method and row.get("task") == task)


def _comparison(rows: Sequence[Row]) -> str:
    kind, tasks = rows[0]["kind"], dict.fromkeys(row["task"] for row in rows)

    def error(task: str) -> Any:
        cell = "{mean:.3f} ± {spread:.3f} ({learning_rate:g})"
        return lambda row: cell.format_map(_of(rows, kind, row["method"], task))

    first = [row for row in rows if row["task"] == next(iter(tasks))]
    columns = {"method": "{method}", "parameters": "{parameters}"}
    return table(columns | {task: error(task) for task in tasks}, first)


def _paired(rows: Sequence[Row]) -> str:
    """What the order adds, seed by seed: both sides saw the same data."""
    parts = []
    for task in learning.DIALECTS:
        spectral, shuffled = (_of(rows, "dialect", method, task)["errors"] for method in (SMOA, SHUFFLED))
        gains = [other - own for own, other in zip(spectral, shuffled, strict=True)]
        better = f"better in {sum(gain > 0 for gain in gains)} of {len(gains)} seeds"
        parts.append(f"“{task}” {statistics.mean(gains):.4f} lower on average, {better}")
    return f"The spectral order against the random one, seed by seed: {'; '.join(parts)}."


def _reach(rows: Sequence[Row]) -> str:
    def learned(task: str) -> Any:
        return lambda row: f"{_of(rows, 'dialect', row['method'], task)['reach']['effective_rank']:.0%}"

    columns = {
        "method": "{method}",
        "rank, random factors": "{rank:.0%}",
        "effective rank, random factors": "{effective_rank:.0%}",
        "directions of W, random factors": "{directions:.0%}",
    }
    columns |= {f"effective rank learned on “{task}”": learned(task) for task in learning.DIALECTS}
    return table(columns, of_kind(rows, "reach"))
