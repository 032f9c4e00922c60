"""One adapter folded into the base weights of a worker: what `mover` stages, commits and undoes, and what each step
switches in place."""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import NoReturn

import torch
from smoa_kernels import DEFAULT_COST, CostModel, LayerBank, MergedBlock
from torch import Tensor

from smoa_serve.adapters.rounding import Lost
from smoa_serve.engine.exchange import WeightExchange, exchange_of
from smoa_serve.engine.linear import SmoaLinearMixin
from smoa_serve.errors import AdapterBusyError, AdapterError, SmoaError
from smoa_serve.settings import OthersGet

logger = logging.getLogger(__name__)


class WeightChecksumError(SmoaError):
    """A base weight is not what it was when the server started: nothing may be served from it."""


class Merger:
    """The merged state of one worker.

    Args:
        layers: module name -> layer that takes SMoA deltas.

    Attributes:
        lora_id: vLLM's number of the adapter that is merged, or of the one that is being staged.
        merged: whether switching is possible; active: whether the weights hold the update now.
        policy: of the merged adapter.
        broken: why nothing may be served any more; None while every weight is known to be whole.
        untidy: something of an adapter that is not merged any more could not be given back yet.
    """

    def __init__(self, layers: dict[str, SmoaLinearMixin]) -> None:
        self._layers = layers
        self._exchanges: dict[str, WeightExchange] = {}
        self._checksums: dict[str, bytes] = {}
        self._lost: dict[str, Lost] = {}
        self.lora_id: int | None = None
        self.merged = self.active = False
        self._one_pass, self._rank, self._cost = False, 0, DEFAULT_COST
        self.policy = OthersGet.COMPENSATE
        self.broken: str | None = None
        self.untidy, self._dropping = False, list[WeightExchange]()

    @cached_property
    def switches_freely(self) -> bool:
        """Whether switching takes no time, so that no step is slower for anything being merged."""
        exchanges = [exchange_of(layer.base_layer, layer.smoa_weight) for layer in self._layers.values()]
        return all(isinstance(exchange, str) or exchange.free for exchange in exchanges)

    @property
    def lost(self) -> dict[str, float]:
        """Layer -> share of the update that rounding removes, as far as it is staged."""
        return {name: lost.share for name, lost in self._lost.items()}

    @property
    def nbytes(self) -> int:
        """Bytes held for it on this worker: staged weights, and the difference for other requests."""
        return sum(exchange.nbytes for exchange in self._exchanges.values()) + sum(
            layer.smoa_bank.merged_bytes for layer in self._layers.values()
        )

    def stage(self, lora_id: int, slot: int) -> tuple[int, Iterator[bool]]:
        """Prepare to merge the adapter that a slot holds; nothing else is being staged.

        Returns:
            How many layers there are, and the work in pieces: True for the last one of a layer.

        Raises:
            AdapterBusyError: another adapter is merged.
            AdapterError: a layer's weight cannot be exchanged.
        """
        if self.untidy:
            self._drop()
        if self.merged:
            raise AdapterBusyError(f"adapter {lora_id}", "another adapter is merged; un-merge it first")
        touched = {name: layer for name, layer in self._layers.items() if any(_live(layer, slot))}
        exchanges: dict[str, WeightExchange] = {}
        refused: dict[str, list[str]] = {}  # reason -> layers, of which a model has hundreds
        for name, layer in touched.items():
            exchange = exchange_of(layer.base_layer, layer.smoa_weight)
            if isinstance(exchange, str):
                refused.setdefault(exchange, []).append(name)
            else:
                exchanges[name] = exchange
        if refused:
            reasons = [f"{_named(names)} cannot be merged: {reason}" for reason, names in refused.items()]
            raise AdapterError(f"adapter {lora_id}", reasons)
        self._exchanges, self.lora_id, self._lost = exchanges, lora_id, {}
        return len(exchanges), self._stage(slot)

    @torch.inference_mode()
    def _stage(self, slot: int) -> Iterator[bool]:
        for name, exchange in self._exchanges.items():
            if name not in self._checksums:
                self._checksums[name] = exchange.checksum()
                yield False
            lost = self._lost[name] = Lost()
            for _ in self._stage_layer(exchange, self._layers[name].smoa_bank, slot, lost):
                yield False
            yield True
        touched = [self._layers[name] for name in self._exchanges]
        self._one_pass = all(_whole(layer, slot) for layer in touched)
        ranks = [entry.rank for layer in touched for entry in layer.smoa_bank.slots[slot] if entry is not None]
        self._rank = max(ranks, default=0)
        if touched:
            self._cost = touched[0].smoa_bank.cost
        for name, layer in self._layers.items():
            if name not in self._exchanges:
                layer.smoa_bank.hold_merged(slot, [()] * len(layer.smoa_bank.slices))

    @staticmethod
    def _stage_layer(exchange: WeightExchange, bank: LayerBank, slot: int, lost: Lost) -> Iterator[None]:
        """A block at a time: each is formed once, for the weight, for what rounding removes and for what others get."""
        back: list[list[Tensor]] = [[] for _ in bank.slices]
        offsets = [sum(bank.slices[:index]) for index in range(len(bank.slices))]

        def blocks() -> Iterator[tuple[Tensor, MergedBlock]]:
            for block in bank.merged_blocks(slot):
                lost.add(block.update, block.after.float() - block.before.float())
                back[block.index].append(block.back)
                yield offsets[block.index] + block.rows, block

        yield from exchange.stage(blocks())
        bank.hold_merged(slot, back)

    def commit(self) -> None:
        """The staged adapter counts as merged from the next step on."""
        assert all(layer.smoa_bank.merged for layer in self._layers.values()), "a half-staged adapter"
        self.merged = True
        for name in self._exchanges:
            self._layers[name].smoa_weight.original = self._as_original

    def for_step(self, token_lora_ids: Sequence[int], slots: Mapping[int, int]) -> bool:
        """Put the merged weights in place for a step, or the original ones.

        Args:
            token_lora_ids: adapter of each token, 0 for the base.
            slots: adapter -> slot, of those that are SMoA.

        Returns:
            Whether the merged ones are. A switch that fails leaves those that were, and they serve everybody too.
        """
        try:
            self._switch(self._wants(token_lora_ids, slots))
        except WeightChecksumError:
            raise
        except Exception:
            logger.exception("Weights stay as they are: switching them failed")
        return self.active

    def _wants(self, token_lora_ids: Sequence[int], slots: Mapping[int, int]) -> bool:
        if not self.merged:
            return False
        present = Counter(token_lora_ids)
        own = present.pop(self.lora_id, 0) if self.lora_id is not None else 0
        if not present:
            return True
        if self.policy is OthersGet.EXCLUSIVE:
            return False
        if not self.switches_freely:
            return True
        one_pass = self._one_pass and present.keys() <= slots.keys()
        return merged_is_cheaper(
            self._cost, self._rank, own, present.total(), bool(present.keys() & slots.keys()), one_pass
        )

    @torch.inference_mode()
    def _switch(self, active: bool) -> None:
        """Puts the merged weights in place, or the original ones: in every layer or in none.

        Raises:
            WeightChecksumError: some layers hold one and some the other.
        """
        if active == self.active:
            return
        switched: list[WeightExchange] = []
        try:
            for exchange in self._exchanges.values():
                exchange.switch()
                switched.append(exchange)
        except BaseException as error:
            try:
                for exchange in switched:
                    exchange.switch()
            except BaseException:
                self._break("switching the weights of some layers failed, and so did switching the others back")
            raise error
        self.active = active

    @contextmanager
    def _as_original(self) -> Iterator[None]:
        active = self.active
        self._switch(False)
        try:
            yield
        finally:
            self._switch(active)

    def undo(self) -> None:
        """Un-merge, or give up staging. After un-merging, every weight is compared with what it was; where that raises
        anything else than the error below, the adapter is still merged.

        Raises:
            WeightChecksumError: one is not.
        """
        if self.merged:
            self._switch(False)
            self._compare()
        self._drop()

    def _compare(self) -> None:
        changed = [
            name
            for name, exchange in self._exchanges.items()
            if name in self._checksums and exchange.checksum() != self._checksums[name]
        ]
        if changed:
            self._break(
                f"after un-merging, {len(changed)} base weights are not what they were: {', '.join(changed[:5])}"
            )

    def _break(self, why: str) -> NoReturn:
        self.broken = f"{why}; restart the server"
        raise WeightChecksumError(self.broken)

    def _drop(self) -> None:
        """Give back all that was staged; the original weights have to be in place."""
        self._dropping += self._exchanges.values()
        self._exchanges, self.lora_id, self.merged, self.untidy = {}, None, False, True
        in_every_layer(
            [
                *(exchange.undo for exchange in self._dropping),
                *(layer.smoa_weight.reset_original for layer in self._layers.values()),
                *(layer.smoa_weight.close for layer in self._layers.values()),
                *(layer.smoa_bank.drop_merged for layer in self._layers.values()),
            ]
        )
        self._dropping, self.untidy = [], False


def in_every_layer(undo: Sequence[Callable[[], object]]) -> None:
    """Give back what layers hold: all of it, whatever one of them raises, and once more where one does."""
    try:
        _call_all(undo)
    except Exception:
        logger.exception("Giving back what was staged failed in a layer; it is tried once more")
        _call_all(undo)


def _call_all(calls: Sequence[Callable[[], object]]) -> None:
    with ExitStack() as stack:
        for call in reversed(calls):
            stack.callback(call)


def merged_is_cheaper(cost: CostModel, rank: int, own: int, others: int, adapters: bool, one_pass: bool) -> bool:
    """Whether a step takes less time on the merged weights, where the original ones are at hand too.

    Counted in rows through the blocks: the original weights need the merged adapter's own delta, the merged ones what
    all others take back.

    Args:
        cost: of the kernel; rank: highest of the merged adapter in any layer.
        own: tokens of the merged adapter; others: all other tokens, at least one.
        adapters: whether some of these have an adapter; one_pass: whether all have one that the original weights serve
            in one pass. Where it is not one pass, the blocks are read once more.
    """
    original = cost.rows(own, rank)
    if one_pass:
        original *= cost.beside
    elif own:
        original += cost.resident
    return others + cost.resident * (2 if adapters else 1) < original


def _named(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more layers"


def _whole(layer: SmoaLinearMixin, slot: int) -> bool:
    """Whether all that an adapter changes in a layer is served by one pass over the weight."""
    return all(
        entry is None or entry.idle or entry.partition is layer.smoa_bank.whole_partition(index)
        for index, entry in enumerate(layer.smoa_bank.slots[slot])
    )


def _live(layer: SmoaLinearMixin, slot: int) -> list[bool]:
    return [entry is not None and not entry.idle for entry in layer.smoa_bank.slots[slot]]
