"""Reads adapters in the worker: SMoA and HiRA by our readers, LoRA by vLLM, all from private copies."""

from functools import cached_property
from pathlib import Path

import msgspec
import torch
from vllm.config import VllmConfig
from vllm.lora.lora_model import LoRAModel
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

from smoa_serve.adapter import AdapterKind
from smoa_serve.base_checkpoint import BaseCheckpoint
from smoa_serve.engine.model_manager import SmoaModelManager
from smoa_serve.errors import AdapterError
from smoa_serve.formats import LoadOptions, load_adapter
from smoa_serve.settings import Settings
from smoa_serve.store import AdapterStore, StagedAdapter

REMEMBERED = 32  # refusals that nobody asks for, as in offline use


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
        self._settings = Settings.from_environment()
        self._store = AdapterStore()
        self._copies: dict[int, tuple[str, Path]] = {}
        self.refusals: dict[int, list[str]] = {}

    @cached_property
    def _base(self) -> BaseCheckpoint:
        model, revision = self._model
        return BaseCheckpoint.open(model, revision=revision)

    def _load_adapter(self, lora_request: LoRARequest) -> LoRAModel:
        staged = self._private_copy(lora_request)
        if staged.kind is AdapterKind.LORA:
            lora = super()._load_adapter(msgspec.structs.replace(lora_request, lora_path=str(staged.path)))
            self._adapter_manager.check_lora(lora, staged.source)
            return lora
        # The copy was checked against the base when it was made; reading it again needs no base.
        adapter = load_adapter(staged.path, None)
        return self._adapter_manager.make_model(adapter, lora_request.lora_int_id, staged.source)

    def _private_copy(self, request: LoRARequest) -> StagedAdapter:
        """The store's entry for a request. An adapter that was accepted once is never read from its source again, so
        it can come back from eviction when its files are gone."""
        path, copy = self._copies.get(request.lora_int_id, ("", None))
        again = copy is not None and path == request.lora_path and not request.load_inplace
        staged = self._store.entry(copy if again and copy is not None else request.lora_path)
        if staged is None:
            staged = self._store.stage(request.lora_path, self._base, self._options)
        self._copies[request.lora_int_id] = (request.lora_path, staged.path)
        return staged

    @property
    def _options(self) -> LoadOptions:
        return LoadOptions(
            allow_pickle=self._settings.allow_pickle,
            strict_order=self._settings.strict_order,
            max_rank=self.lora_config.max_lora_rank,
        )

    def add_adapter(self, lora_request: LoRARequest) -> bool:
        """Load an adapter, or mark a loaded one as used. vLLM goes by the number alone; here another path under a known
        number replaces what was loaded, so that nobody gets the earlier adapter's output."""
        path, _ = self._copies.get(lora_request.lora_int_id, (lora_request.lora_path, None))
        if path != lora_request.lora_path:
            lora_request = msgspec.structs.replace(lora_request, load_inplace=True)
        try:
            loaded: bool = super().add_adapter(lora_request)
        except Exception as error:
            self._remember(lora_request.lora_int_id, error)
            raise
        return loaded

    def _remember(self, lora_int_id: int, error: Exception) -> None:
        """Keep why an adapter was refused: on its way to the API server the error becomes one text of vLLM's."""
        if isinstance(error, AdapterError):
            reasons = error.reasons
        elif isinstance(error, ValueError):
            reasons = [f"vLLM refused it: {error}"]
        else:
            reasons = [f"loading it failed: {type(error).__name__}: {error}"]
        self.refusals[lora_int_id] = reasons
        while len(self.refusals) > REMEMBERED:
            del self.refusals[next(iter(self.refusals))]

    def _apply_adapters(self, lora_requests: set[LoRARequest]) -> None:
        self._adapter_manager.touch_active({request.lora_int_id for request in lora_requests if request})
        super()._apply_adapters(lora_requests)
