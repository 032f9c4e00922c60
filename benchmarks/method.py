"""The paper's claims, checked: LoRA, DoRA, HiRA, SMoA and SMoA with a random order at equal trainable parameters.

Every method gets the same search: one training per learning rate of one grid, on a seed of its own; the best of them
is then trained on other seeds. `python -m benchmarks method` writes the tables and the plot of docs/method.md.
"""

import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.bars import Bar
from benchmarks.method_models import GRID, METHODS, Fit
from benchmarks.method_reach import family_reach
from benchmarks.method_report import write_report
from benchmarks.method_tasks import (
    CHARACTER_RANK,
    DIALECTS,
    REGRESSION_RANK,
    TARGETS,
    Result,
    dialect,
    llm_like_weight,
    pretrain,
    regression,
    untouched_loss,
)

SEARCH_SEED = 0
RunTask = Callable[[Fit], Result]


@dataclass(frozen=True)
class Plan:
    """How much is run.

    Attributes:
        seeds: reported, after the search.
        regression_steps: of one training.
        dialect_steps: likewise.
        pretraining_steps: of the character model.
    """

    seeds: int
    regression_steps: int
    dialect_steps: int
    pretraining_steps: int


FULL = Plan(seeds=5, regression_steps=400, dialect_steps=100, pretraining_steps=500)
QUICK = Plan(seeds=1, regression_steps=60, dialect_steps=5, pretraining_steps=60)


def run(quick: bool) -> tuple[list[dict[str, object]], list[Bar]]:
    """Compare the methods; a full run rewrites docs/method.md.

    Args:
        quick: few steps and one seed: shows that it runs, its figures mean nothing.
    """
    plan = QUICK if quick else FULL
    rows = family_reach(llm_like_weight(SEARCH_SEED), REGRESSION_RANK, 1 if quick else 5)
    workers = len(os.sched_getaffinity(0))
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_one_thread) as pool,
    ):
        base = Path(folder) / "base.pt"
        learnt = pool.submit(pretrain, base, plan.pretraining_steps).result()
        tasks: list[tuple[str, str, int, int, RunTask]] = [
            ("regression", target, REGRESSION_RANK, plan.regression_steps, partial(regression, target))
            for target in TARGETS
        ]
        tasks += [
            ("dialect", kind, CHARACTER_RANK, plan.dialect_steps, partial(dialect, kind, base_file=base))
            for kind in DIALECTS
        ]
        for family, name, rank, steps, task in tasks:
            found = _compare(pool, task, Fit("", rank, 0.0, steps, SEARCH_SEED), plan.seeds)
            rows += [{"kind": family, "task": name, **row} for row in found]
            _print(name, found)
        untouched = {kind: pool.submit(untouched_loss, kind, base).result() for kind in DIALECTS}
    rows.append({"kind": "base", "loss_of_its_own_dialect": learnt, **untouched})
    if not quick:
        write_report(rows, plan.seeds)
    return rows, []


def _compare(pool: ProcessPoolExecutor, task: RunTask, fit: Fit, seeds: int) -> list[dict[str, object]]:
    """Search, then report, for every method."""
    searched = {
        (method, rate): pool.submit(task, replace(fit, method=method, learning_rate=rate))
        for method in METHODS
        for rate in GRID
    }
    best = {
        method: min(GRID, key=lambda rate: _error(searched[method, rate].result())) for method in METHODS
    }  # fmt: skip
    measured = {
        method: [
            pool.submit(task, replace(fit, method=method, learning_rate=best[method], seed=SEARCH_SEED + 1 + seed))
            for seed in range(seeds)
        ]
        for method in METHODS
    }
    return [
        _row(method, best[method], [future.result() for future in measured[method]],
             {rate: _error(searched[method, rate].result()) for rate in GRID})
        for method in METHODS
    ]  # fmt: skip


def _error(result: Result) -> float:
    return result.error if result.error == result.error else float("inf")  # not a number: it diverged


def _row(method: str, rate: float, results: Sequence[Result], search: dict[float, float]) -> dict[str, object]:
    errors = [_error(result) for result in results]
    reach = {key: statistics.mean(r.reach[key] for r in results if r.reach) for key in results[0].reach}
    return {
        "method": method,
        "parameters": results[0].parameters,
        "learning_rate": rate,
        "errors": errors,
        "mean": statistics.mean(errors),
        "spread": statistics.stdev(errors) if len(errors) > 1 else 0.0,
        "search": {f"{rate:g}": error for rate, error in search.items()},
        "reach": reach,
    }


def _print(task: str, rows: Sequence[dict[str, object]]) -> None:
    table = Table("method", "parameters", "learning rate", "error", "effective rank", title=task)
    for row in rows:
        reach = row["reach"]
        assert isinstance(reach, dict)
        rank = f"{reach['effective_rank']:.0%}" if reach else "-"
        error = f"{row['mean']:.4f} ± {row['spread']:.4f}"
        table.add_row(str(row["method"]), str(row["parameters"]), f"{row['learning_rate']:g}", error, rank)
    Console().print(table)


def _one_thread() -> None:
    torch.set_num_threads(1)
