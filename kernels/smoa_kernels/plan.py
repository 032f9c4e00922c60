"""Which tokens of an engine step use which slot: built once on the host, shared by all layers."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from smoa_kernels.cost import CostModel
from smoa_kernels.errors import PlanError

Value = TypeVar("Value")
_VERSIONS = count(1)
DEFAULT_RANK = 8  # until a slot is described


@dataclass(frozen=True)
class TokenGroup:
    """The tokens of one slot: positions [start, end) of the plan's token order."""

    slot: int
    start: int
    end: int

    @property
    def count(self) -> int:
        """Number of tokens."""
        return self.end - self.start


@dataclass(frozen=True)
class TokenSet:
    """Rows of x and y: a range where they are consecutive, else an index. Exactly one of the two is given."""

    rows: slice | None
    index: Tensor | None

    def take(self, x: Tensor) -> Tensor:
        """Those rows of x: a view for a range, a copy otherwise."""
        return x[self.rows] if self.index is None else x.index_select(0, self.index)


class StepPlan:
    """Token-to-slot metadata of one engine step.

    Running example, token_to_slot = [3, -1, 0, 3]: groups are slot 3 with tokens 0, 3 and slot 0 with token 2, in the
    order in which the slots appear; token_order = [0, 3, 2].

    Args:
        max_tokens: longest batch.
        num_slots: slots are 0 .. num_slots - 1; -1 means no adapter.
        device: where the tensors of the metadata live.

    Attributes:
        token_to_slot: [max_tokens] int32 on the device, -1 beyond num_tokens. Never reallocated.
        token_order: [max_tokens] int32 on the device, tokens with an adapter grouped by slot. Never reallocated.
        num_tokens: length of the current batch.
        groups: the slots present, by first token.
        merged: whether the base weight holds an adapter's update; its tokens need no delta and are in no group.
        compensation: then the plan that gives all other tokens slot `num_slots` (see `LayerBank.hold_merged`); else
            None.
        ranks: [S] highest live rank that any layer has of each slot, and residents: whether it has resident blocks.
            Only backends that choose the ways once for all layers go by them; see `describe`.
        cost: for that choice; None = the backend's own constants.
        version: identity of the current map, unique among all plans; unchanged by an update with an equal map.
    """

    def __init__(self, max_tokens: int, num_slots: int, device: torch.device | str) -> None:
        if max_tokens < 1 or num_slots < 1:
            raise PlanError(f"max_tokens {max_tokens} and num_slots {num_slots} must both be at least 1.")
        self.max_tokens, self.num_slots, self.device = max_tokens, num_slots, torch.device(device)
        self.token_to_slot = torch.full((max_tokens,), -1, dtype=torch.int32, device=self.device)
        self.token_order = torch.zeros(max_tokens, dtype=torch.int32, device=self.device)
        self.num_tokens = 0
        self.groups: tuple[TokenGroup, ...] = ()
        self.order: NDArray[np.int64] = np.empty(0, np.int64)
        self.merged = False
        self.compensation: StepPlan | None = None
        self._others: StepPlan | None = None
        self.ranks = [DEFAULT_RANK] * num_slots
        self.residents = [False] * num_slots
        self.cost: CostModel | None = None
        self.version = 0
        self._described = False
        self._attached: dict[Hashable, Any] = {}
        self._slots: NDArray[np.int64] = np.empty(0, np.int64)
        self._cache: dict[Hashable, Any] = {}
        self._scratch = torch.empty(0, dtype=torch.uint8, device=self.device)

    @property
    def active(self) -> bool:
        """Whether any token has an adapter."""
        return bool(self.groups)

    def update(self, token_to_slot: Sequence[int] | NDArray[np.integer[Any]], merged: bool = False) -> None:
        """Takes the map of the next step.

        Args:
            token_to_slot: slot of each token, -1 for no adapter; at most max_tokens long. Where something is merged,
                `num_slots` stands for its own tokens.
            merged: whether the base weights hold the update of the adapter that every layer's bank holds as merged.

        Raises:
            PlanError: the batch is too long, not one-dimensional, or names a slot that does not exist.
        """
        slots = np.asarray(token_to_slot, dtype=np.int64)
        if slots.ndim != 1 or slots.size > self.max_tokens:
            raise PlanError(
                f"token_to_slot has shape {slots.shape}; a plan for max_tokens={self.max_tokens} takes one dimension "
                "of at most that length. Make the plan with the engine's largest batch."
            )
        last = self.num_slots if merged else self.num_slots - 1
        if slots.size and (slots.min() < -1 or slots.max() > last):
            raise PlanError(
                f"token_to_slot holds slots from {slots.min()} to {slots.max()}; allowed are -1 (no adapter) to {last}."
            )
        self._compensate(slots, merged)
        self.merged = merged
        slots = np.where(slots == self.num_slots, -1, slots)
        # Decoding sends the same map step after step: what was derived from it stays good.
        if self.version and not self._described and np.array_equal(slots, self._slots):
            return
        self._described = False
        self._slots = slots.copy()
        self.num_tokens = int(slots.size)
        self.version = next(_VERSIONS)
        self._cache.clear()
        self._group(slots)
        self.token_to_slot.fill_(-1)
        self.token_to_slot[: slots.size].copy_(torch.from_numpy(slots))
        self.token_order[: self.order.size].copy_(torch.from_numpy(self.order))
        for state in self._attached.values():
            state.write(self)

    def describe(self, slot: int, rank: int, resident: bool) -> None:
        """Says what a slot holds, so that its tokens go the cheapest way from the next update on. A wrong word costs
        time, never exactness.

        Args:
            slot: 0 .. num_slots - 1.
            rank: highest live rank in any layer; 0 = resident blocks only.
            resident: whether its blocks of dW are held.
        """
        if (self.ranks[slot], self.residents[slot]) != (rank, resident):
            self.ranks[slot], self.residents[slot] = rank, resident
            self._described = True

    def attached(self, kind: Callable[["StepPlan"], Value]) -> Value:
        """A backend's state of this plan: `kind(self)` at the first call, never another. Its `write(self)` is told of
        every step."""
        if kind not in self._attached:
            self._attached[kind] = kind(self)
            self._attached[kind].write(self)
        state: Value = self._attached[kind]
        return state

    def _compensate(self, slots: NDArray[np.int64], merged: bool) -> None:
        if not merged:
            self.compensation = None
            return
        if self._others is None:
            self._others = StepPlan(self.max_tokens, self.num_slots + 1, self.device)
            self._others.describe(self.num_slots, 0, resident=True)
        self._others.update(np.where(slots == self.num_slots, -1, self.num_slots))
        self.compensation = self._others

    def _group(self, slots: NDArray[np.int64]) -> None:
        # By first token, not by slot number: consecutive requests then stay consecutive and need no gather.
        first: dict[int, int] = {}
        for token, slot in enumerate(slots.tolist()):
            if slot >= 0 and slot not in first:
                first[slot] = token
        key = np.full(self.num_slots + 1, np.iinfo(np.int64).max, np.int64)
        for slot, token in first.items():
            key[slot] = token
        order = np.argsort(key[slots], kind="stable")
        self.order = order[: int((slots >= 0).sum())].astype(np.int64)
        counts = np.bincount(slots[slots >= 0], minlength=self.num_slots)
        groups, start = [], 0
        for slot in first:
            groups.append(TokenGroup(slot, start, start + int(counts[slot])))
            start = groups[-1].end
        self.groups = tuple(groups)

    def cached(self, key: Hashable, build: Callable[[], Value]) -> Value:
        """`build()`, remembered under `key` until the next update: layers with the same pattern share it."""
        if key not in self._cache:
            self._cache[key] = build()
        value: Value = self._cache[key]
        return value

    def scratch(self, nbytes: int) -> Tensor:
        """At least `nbytes` uninitialised bytes on the device, the same memory for every layer of the step."""
        if self._scratch.numel() < nbytes:
            self._scratch = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        return self._scratch

    def tokens(self, groups: Sequence[TokenGroup]) -> TokenSet:
        """The tokens of some groups, in the given order."""
        return self.cached(("tokens", tuple(groups)), lambda: self._token_set(groups))

    def _token_set(self, groups: Sequence[TokenGroup]) -> TokenSet:
        index = np.concatenate([self.order[group.start : group.end] for group in groups])
        if np.array_equal(index, np.arange(index[0], index[0] + index.size)):
            return TokenSet(slice(int(index[0]), int(index[0]) + index.size), None)
        return TokenSet(None, torch.from_numpy(index).to(self.device))
