"""Reads adapters in the worker: SMoA and HiRA by our readers, LoRA by vLLM, all from private copies."""

import logging
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import safe_open
from vllm.config import VllmConfig
from vllm.lora.layers import LoRAMapping
from vllm.lora.lora_model import LoRAModel
from vllm.lora.request import LoRARequest
from vllm.lora.utils import parse_fine_tuned_lora_name
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

from smoa_serve.adapters import LoadOptions, load_adapter
from smoa_serve.adapters.source import WEIGHTS_NAME
from smoa_serve.base.checkpoint import BaseCheckpoint
from smoa_serve.engine.bind import check_lora_names, rename_mapper
from smoa_serve.engine.host import heap
from smoa_serve.engine.manager import SmoaModelManager
from smoa_serve.errors import AdapterError, reasons_of
from smoa_serve.settings import process_settings
from smoa_serve.store import AdapterStore, StagedAdapter

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Copy:
    """What a number of vLLM's means here.

    Attributes:
        requested: the path of the request; staged: the private copy that was read.
    """

    requested: str
    staged: StagedAdapter


class SmoaWorkerManager(LRUCacheWorkerLoRAManager):
    """The worker's adapter caches: host memory and slots.

    Attributes:
        refusals: lora_int_id -> every reason why it could not be loaded, until somebody asks; the last few.
    """

    _manager_cls = SmoaModelManager
    _adapter_manager: SmoaModelManager

    def __init__(
        self,
        vllm_config: VllmConfig,
        device: torch.device,
        embedding_modules: dict[str, str],
        lora_model_cls: type[LoRAModel] = LoRAModel,
    ) -> None:
        super().__init__(vllm_config, device, embedding_modules, lora_model_cls)
        self._model = (vllm_config.model_config.model, vllm_config.model_config.revision)
        self._settings = process_settings().adapters
        self._store = AdapterStore()
        self._copies: dict[int, _Copy] = {}
        self._failed: frozenset[int] = frozenset()

    @cached_property
    def _base(self) -> BaseCheckpoint:
        model, revision = self._model
        return BaseCheckpoint.open(model, revision=revision)

    def _load_adapter(self, lora_request: LoRARequest) -> LoRAModel:
        staged = self._private_copy(lora_request)
        if staged.kind.modulates:
            # The copy was checked against the base when it was made; reading it again needs no base.
            adapter = load_adapter(staged.path, None)
            if adapter.digest != staged.digest:
                raise AdapterError(staged.source, "its private copy was replaced while it was read; ask for it again")
            lora = self._adapter_manager.make_model(adapter, lora_request.lora_int_id, staged.source)
        else:
            lora = self._load_lora(lora_request, staged)
        lora.smoa_copy = _Copy(lora_request.lora_path, staged)
        return lora

    def _load_lora(self, lora_request: LoRARequest, staged: StagedAdapter) -> LoRAModel:
        """By vLLM's own loader, once it is clear that every factor has a layer to go to.

        Raises:
            AdapterError: every reason why this engine cannot serve it.
        """
        try:
            check_lora_names(self._adapter_manager, self._module_names(staged.path), staged.source)
            lora = super()._load_adapter(msgspec.structs.replace(lora_request, lora_path=str(staged.path)))
        except (ValueError, AssertionError, TypeError) as error:
            reason = str(error).replace(str(staged.path), staged.source)
            raise AdapterError(staged.source, f"vLLM cannot serve it: {reason}") from error
        self._adapter_manager.check_lora(lora, staged.source)
        return lora

    def _module_names(self, copy: Path) -> list[str]:
        """The modules of a LoRA adapter, named as vLLM does."""
        mapper = rename_mapper(self._adapter_manager.model)
        with safe_open(copy / WEIGHTS_NAME, framework="pt") as file:
            return [parse_fine_tuned_lora_name(key, mapper)[0] for key in file.keys()]  # noqa: SIM118

    def _private_copy(self, request: LoRARequest) -> StagedAdapter:
        """The store's entry for a request. An adapter that was accepted once is read from its source again only when
        its copy is gone, and then only if the same content is still there.

        Raises:
            AdapterError: neither is to be had.
        """
        known = self._copies.get(request.lora_int_id)
        again = known is not None and known.requested == request.lora_path and not request.load_inplace
        if known is None or not again:
            return self._store.entry(request.lora_path) or self._stage(request)
        staged = self._store.entry(known.staged.path)
        if staged is not None:
            return staged
        logger.warning("The private copy %s is gone or damaged; it is made again", known.staged.path)
        staged = self._stage(request)
        if staged.digest != known.staged.digest:
            reason = "its private copy is gone or damaged, and where it came from there is other content now"
            raise AdapterError(request.lora_name, f"{reason}; load it again")
        return staged

    def _stage(self, request: LoRARequest) -> StagedAdapter:
        return self._store.stage(self._store.open(request.lora_path, self._options), self._base)

    @property
    def _options(self) -> LoadOptions:
        return LoadOptions(
            allow_pickle=self._settings.allow_pickle,
            strict_order=self._settings.strict_order,
            max_rank=self.lora_config.max_lora_rank,
        )

    def add_adapter(self, lora_request: LoRARequest) -> bool:
        """Load an adapter, or mark a loaded one as used. vLLM goes by the number alone; here another path under a known
        number replaces what was loaded, so that nobody gets the earlier adapter's output. Where that is refused, the
        number goes on to mean what it did, and asking with the other path is refused again."""
        number = lora_request.lora_int_id
        known = self._copies.get(number)
        if known is not None and known.requested != lora_request.lora_path:
            lora_request = msgspec.structs.replace(lora_request, load_inplace=True)
        try:
            loaded: bool = super().add_adapter(lora_request)
        finally:
            # Whether that failed or not: what the manager has now is what the number means.
            copy = getattr(self._adapter_manager.get_adapter(number), "smoa_copy", None)
            if copy is not None:
                self._copies[number] = copy
        self._failed -= {number}
        return loaded

    def remove_adapter(self, adapter_id: int) -> bool:
        """Forget an adapter and what its number meant."""
        self._copies.pop(adapter_id, None)
        removed: bool = super().remove_adapter(adapter_id)
        heap.trim()
        return removed

    def ready(self, requests: Collection[LoRARequest]) -> dict[int, list[str]]:
        """Bring the adapters of the next step into slots. What fails is left out of that step.

        Args:
            requests: of all adapters of the step.

        Returns:
            Number -> every reason why its adapter cannot be served.
        """
        self._adapter_manager.touch_active({request.lora_int_id for request in requests})
        failed = {}
        for request in requests:
            try:
                self.add_adapter(request)
            except Exception as error:  # whatever it is, it is these requests' own
                trace = None if isinstance(error, AdapterError) else error
                logger.error("Adapter %s is not in its slot: %s", request.lora_name, error, exc_info=trace)
                failed[request.lora_int_id] = reasons_of(error)
        self._failed = frozenset(failed)
        return failed

    def leave_out(self, numbers: Collection[int]) -> None:
        """Forget adapters that are in their slots here and not on another worker; see `ready`."""
        for number in numbers:
            super().remove_adapter(number)  # what the number means stays: other content must not take its place
        self._failed |= frozenset(numbers)

    @property
    def active(self) -> dict[int, str]:
        """Number -> requested path, of all adapters in slots."""
        return {
            number: self._copies[number].requested
            for number in self._adapter_manager.lora_index_to_id
            if number is not None and number in self._copies
        }

    def set_active_adapters(self, requests: set[Any], mapping: LoRAMapping | None) -> None:
        """What vLLM calls once per step. Numbers mean what `ready` brought into the slots. Tokens whose adapter failed
        there count as the base's; nobody gets to see what comes of them."""
        active = self.active
        requests = {
            msgspec.structs.replace(
                request, lora_path=active.get(request.lora_int_id, request.lora_path), load_inplace=False
            )
            for request in requests
            if request and request.lora_int_id not in self._failed
        }
        if mapping is not None and self._failed.intersection(mapping.index_mapping):
            mapping = LoRAMapping(
                index_mapping=tuple(0 if i in self._failed else i for i in mapping.index_mapping),
                prompt_mapping=tuple(0 if i in self._failed else i for i in mapping.prompt_mapping),
                is_prefill=mapping.is_prefill,
                type=mapping.type,
            )
        super().set_active_adapters(requests, mapping)

    def _apply_adapters(self, lora_requests: set[LoRARequest]) -> None:
        self._adapter_manager.touch_active({request.lora_int_id for request in lora_requests if request})
        super()._apply_adapters(lora_requests)
