"""vLLM's registry of served models, with adapters as content-addressed revisions."""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from vllm.entrypoints.openai.models import serving as vllm_serving
from vllm.lora.request import LoRARequest

from smoa_serve.adapters import LoadOptions
from smoa_serve.base.checkpoint import BaseCheckpoint
from smoa_serve.engine.host import heap
from smoa_serve.engine.host.logs import share_logging
from smoa_serve.engine.messages import WorkerStatus
from smoa_serve.errors import (
    AdapterError,
    AdapterNotFoundError,
    CompatibilityError,
    ConfigError,
    EngineGoneError,
    MoveFailedError,
    PathNotAllowedError,
    WorkerError,
    reasons_in,
    shown,
)
from smoa_serve.registry.revisions import Revision, default_mm_reason, engine_name, name_reason, visible_name
from smoa_serve.residence.engine_client import (
    answered,
    ask_workers,
    bring_in,
    check_one_process,
    forget_served,
    in_flight,
    run_dummy_batch,
)
from smoa_serve.residence.ladder import Ladder, forget_metrics
from smoa_serve.server.errors import returned, without_private_paths
from smoa_serve.server.paths import download
from smoa_serve.server.private_copies import PrivateCopies
from smoa_serve.server.resolving import find
from smoa_serve.settings import process_settings
from smoa_serve.sources.local import confine
from smoa_serve.store import AdapterStore, StagedAdapter

logger = logging.getLogger(__name__)

_DRAIN_POLL_S = 0.2
_RETRY_S = 5.0


class SmoaServingModels(vllm_serving.OpenAIServingModels):
    """Maps a model name to the revision that answers new requests.

    Attributes:
        revisions: name -> the current revision.
        store: their private copies.
        ladder: moves them.
    """

    revisions: dict[str, Revision]
    store: AdapterStore
    ladder: Ladder

    def begin(self) -> None:
        """What `__init__` would do: instances are vLLM's, turned into this class right after they were made."""
        self.revisions = {}
        settings = process_settings()
        self._settings, self._required = settings.adapters, settings.engine.required
        self.store = AdapterStore()
        self._tasks: set[asyncio.Task[None]] = set()
        self._numbers: dict[str, int] = {}
        self._known: dict[str, Revision] = {}  # by engine name: the current ones and those that drain
        self._draining: set[str] = set()
        self._entering: Counter[str] = Counter()
        self._copies = PrivateCopies(self.store, self._stage_again)
        self.ladder = Ladder(self.engine_client, self.revisions, self.remove_later)
        self.lora_resolver_lock = NameLocks()
        self.engine_client.smoa_models = self
        processor = getattr(self.engine_client, "output_processor", None)
        if processor is not None:
            processor.smoa_copies = self._copies

    @cached_property
    def _base(self) -> BaseCheckpoint:
        return BaseCheckpoint.open(self.model_config.model, revision=self.model_config.revision)

    @property
    def _options(self) -> LoadOptions:
        lora_config = self.engine_client.vllm_config.lora_config
        return LoadOptions(
            allow_pickle=self._settings.allow_pickle,
            strict_order=self._settings.strict_order,
            max_rank=lora_config.max_lora_rank if lora_config is not None else None,
        )

    async def init_static_loras(self) -> None:
        """Check the workers, then load the adapters named at start-up (trusted paths).

        Raises:
            CompatibilityError: a worker runs without the plugin.
            AdapterError: an adapter was refused.
            ConfigError: adapters by modality, or a name twice.
        """
        reason = default_mm_reason(self.engine_client.vllm_config.lora_config)
        if reason is not None:
            raise ConfigError(reason)
        await self._check_workers()
        if self.engine_client.vllm_config.parallel_config.pipeline_parallel_size > 1:
            # vLLM's CPU runner makes the tensors that pass between pipeline ranks in a dummy batch only, and an eager
            # engine runs none: the first request would end it.
            await run_dummy_batch(self.engine_client)
        for module in self.static_lora_modules or []:
            if self.is_base_model(module.name) or module.name in self.revisions:
                raise ConfigError(f"the adapter name {module.name!r} is used twice; give every adapter its own")
            path = Path(module.path) if Path(module.path).exists() else await asyncio.to_thread(download, module.path)
            await self._load(module.name, path, module.path, module.base_model_name)

    async def _check_workers(self) -> None:
        if self.engine_client.vllm_config.lora_config is None:
            if self._required:
                raise CompatibilityError("adapters are not enabled; start the server with --enable-lora")
            return
        try:
            statuses = await ask_workers(self.engine_client, WorkerStatus)
        except EngineGoneError:
            raise
        except Exception as error:
            raise CompatibilityError(f"a worker runs without the smoa-serve plugin: {error}") from error
        for status in statuses:
            if status.refusal:
                logger.warning("This engine serves LoRA adapters only: %s", status.refusal)

    async def _load(self, name: str, path: Path, requested_path: str, parent: str | None = None) -> Revision:
        """Stage an adapter, bring it into the engine, then let the name mean it."""
        _check_name(name)
        staged = await asyncio.to_thread(self._stage, name, path, requested_path)
        previous = self.revisions.get(name)
        if previous is not None and previous.staged.digest == staged.digest:
            return previous
        revision = Revision(name, self._number(engine_name(name, staged.digest)), staged, requested_path, path)
        request = revision.request()
        if parent is not None and self.is_base_model(parent):
            request.base_model_name = parent
        try:
            await bring_in(self.engine_client, request)
        except EngineGoneError:
            raise
        except Exception as error:
            if revision.engine_name not in self._known:
                self._numbers.pop(revision.engine_name, None)
            raise AdapterError(name, self._engines_reasons(error)) from error
        self.revisions[name], self.lora_requests[name] = revision, request
        self._known[revision.engine_name] = revision
        self._copies.note(revision)
        logger.info("Serving adapter %s: %s %s from %s", name, staged.kind, staged.digest[:16], requested_path)
        if previous is not None:
            self.remove_later(previous)
        return revision

    def _number(self, engine_name: str) -> int:
        """The engine's number for a name and content, always the same: vLLM takes adapters of one engine name for one,
        and content that comes back may meet requests of its first time that still run."""
        if engine_name not in self._numbers:
            self._numbers[engine_name] = self.lora_id_counter.inc(1)
        return self._numbers[engine_name]

    def _stage(self, name: str, path: Path, requested_path: str) -> StagedAdapter:
        """Read and check an adapter; what is wrong with it is told by its name and the path that was given."""
        try:
            return self._stage_again(path)
        except AdapterError as error:
            reasons = [self._public(reason.replace(str(path), requested_path)) for reason in error.reasons]
            raise type(error)(name, reasons) from error

    def _stage_again(self, path: Path) -> StagedAdapter:
        return self.store.stage(self.store.open(path, self._options), self._base)

    def _engines_reasons(self, error: Exception) -> list[str]:
        """Why the workers refused an adapter, all of them: vLLM hands on their reasons as one text."""
        return [self._public(reason) for reason in reasons_in(str(error)) or [f"the engine failed: {error}"]]

    def _public(self, text: str) -> str:
        return without_private_paths(text, self.store.root)

    def remove_later(self, revision: Revision) -> None:
        """Free a revision's slot and host memory once no request uses it; what it holds beyond that now."""
        self._remove_later(revision.engine_name, revision.lora_int_id)

    def _remove_later(self, name: str, number: int) -> None:
        """Free a revision's slot and host memory once no request uses it.

        Args:
            name: the engine's; number: likewise.
        """
        if name not in self._draining:
            self._draining.add(name)
            task = asyncio.create_task(self._drain(name, number))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _drain(self, name: str, number: int) -> None:
        try:
            known = self._known.get(name)
            if known is not None:
                with suppress(MoveFailedError, WorkerError):  # tried again before the next move
                    await self.ladder.forget(known)
            while True:
                while self._is_used(name):
                    await asyncio.sleep(_DRAIN_POLL_S)
                # Under the lock of its name: its content does not come back while it goes.
                async with self.lora_resolver_lock[visible_name(name)]:
                    if self._is_current(name):
                        return
                    left = await self._left(name, number)
                    if left and not self._is_used(name):  # or else it was looked up before, and is read again
                        self._forget(name)
                        break
                if not left:
                    await asyncio.sleep(_RETRY_S)
        except EngineGoneError:
            pass  # which vLLM reports itself
        finally:
            self._draining.discard(name)
        await asyncio.to_thread(heap.trim)  # what reading it took

    async def _left(self, name: str, number: int) -> bool:
        """Whether all workers have forgotten a revision."""
        try:
            await answered(self.engine_client, self.engine_client.remove_lora(number), "remove_lora")
        except EngineGoneError:
            raise
        except Exception:
            logger.exception("Adapter revision %s did not leave a worker; it is tried again", name)
            return False
        return True

    def _is_used(self, engine_name: str) -> bool:
        return bool(self._entering[engine_name] or in_flight(self.engine_client, engine_name))

    def _is_current(self, engine_name: str) -> bool:
        current = self.revisions.get(visible_name(engine_name))
        return current is not None and current.engine_name == engine_name

    def _forget(self, engine_name: str) -> None:
        """Drop all that is known about a revision that has left the engine."""
        self._numbers.pop(engine_name, None)
        self._known.pop(engine_name, None)
        self._copies.forget(engine_name)
        forget_served(self.engine_client, engine_name)
        if visible_name(engine_name) not in self.revisions:
            forget_metrics(visible_name(engine_name))
        logger.info("Adapter revision %s left the engine", engine_name)

    @asynccontextmanager
    async def entering(self, lora: LoRARequest) -> AsyncIterator[None]:
        """While a request enters the engine: its revision is not removed, and its private copy is looked after.

        Args:
            lora: of the request. It may have been looked up before its revision left; it then has the number that this
                revision has now, and leaves again after the request.
        """
        name, known = lora.lora_name, self._known.get(lora.lora_name)
        if known is None and visible_name(name) == name:
            yield  # none of ours
            return
        lora.lora_int_id = self._numbers.setdefault(name, lora.lora_int_id)
        self._entering[name] += 1
        try:
            if known is not None:
                await self._copies.check(known)
            yield
        finally:
            self._entering[name] -= 1
            if not self._entering[name]:
                del self._entering[name]
            if not self._is_current(name):
                self._remove_later(name, lora.lora_int_id)

    @returned
    async def load_lora_adapter(self, request: Any, base_model_name: str | None = None) -> Any:
        """`POST /v1/load_lora_adapter`. With `load_inplace`, new content replaces the name's revision at once; requests
        that run finish on the revision they began with."""
        async with self.lora_resolver_lock[request.lora_name]:
            refused = await self._check_load_lora_adapter_request(request)
            if refused is not None:
                return refused
            check_one_process(self.engine_client, f"adapter {shown(request.lora_name)} is not loaded")
            _check_name(request.lora_name)
            if self.is_base_model(request.lora_name):
                raise AdapterError(request.lora_name, "this is the base model's name")
            path = await asyncio.to_thread(self._allowed, request.lora_name, request.lora_path)
            await self._load(request.lora_name, path, request.lora_path, base_model_name)
        return f"Success: LoRA adapter '{request.lora_name}' added successfully."

    def _allowed(self, name: str, path: str) -> Path:
        try:
            try:
                return confine(path, self._settings.adapters_root)
            except (AdapterNotFoundError, PathNotAllowedError):
                if self._settings.allow_hub and not Path(path).is_absolute():
                    return download(path)
                raise
        except AdapterError as error:
            raise type(error)(name, error.reasons) from error

    @returned
    async def unload_lora_adapter(self, request: Any) -> Any:
        """`POST /v1/unload_lora_adapter`: new requests get 404 at once; memory is freed when running ones are done."""
        if request.lora_name and name_reason(request.lora_name) is not None:
            raise _not_loaded(request.lora_name)
        async with self.lora_resolver_lock[request.lora_name]:
            refused = await self._check_unload_lora_adapter_request(request)
            if refused is not None:
                return refused
            check_one_process(self.engine_client, f"adapter {request.lora_name!r} stays loaded")
            del self.lora_requests[request.lora_name]
            revision = self.revisions.pop(request.lora_name)
            self.ladder.pinned.discard(revision.name)
            self.remove_later(revision)
        return f"Success: LoRA adapter '{request.lora_name}' removed successfully."

    @returned
    async def resolve_lora(self, lora_name: str) -> Any:
        """Ask vLLM's resolvers for an unknown name; what they find is served as a revision like any other.

        Returns:
            The adapter's request, or an error: 404 when nobody has the name or nobody can have it, 400 with all reasons
            when every resolver that has it failed.
        """
        if not self.lora_resolvers or name_reason(lora_name) is not None:
            raise _not_loaded(lora_name)
        async with self.lora_resolver_lock[lora_name]:
            if lora_name in self.lora_requests:
                return self.lora_requests[lora_name]
            reasons = []
            check_one_process(self.engine_client, f"no resolver is asked for adapter {lora_name!r}")
            for resolver in self.lora_resolvers:
                try:
                    found = await find(resolver, self.model_config.model, lora_name, self._settings.adapters_root)
                    if found is not None:
                        await self._load(lora_name, found, lora_name)
                        return self.lora_requests[lora_name]
                except AdapterError as error:
                    reasons += error.reasons
        raise AdapterError(lora_name, reasons) if reasons else _not_loaded(lora_name)

    def model_name(self, lora_request: LoRARequest | None = None) -> str:
        """The name in a response: the user's, not the engine's."""
        return visible_name(super().model_name(lora_request))

    async def show_available_models(self) -> Any:
        """`GET /v1/models`: the base, and each adapter with its parent and where it resides, as far as is known."""
        places = await self.ladder.known()
        models = await super().show_available_models()
        for card in models.data:
            revision = self.revisions.get(visible_name(card.id))
            if revision is not None and card.id == revision.engine_name:
                card.id, card.root = revision.name, revision.requested_path
                card.max_model_len = self.model_config.max_model_len
                card.residence = places.get(revision.lora_int_id)  # a field of ours: the card takes any
        return models


class NameLocks(WeakValueDictionary[str, asyncio.Lock]):
    """A lock for each name, for as long as somebody holds it or waits for it; in the place of vLLM's dictionary, which
    keeps one for every name that was ever asked for."""

    def __getitem__(self, name: str) -> asyncio.Lock:
        return self.setdefault(name, asyncio.Lock())


def enter(wrapped: Callable[..., None], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A wrapper of `OpenAIServingModels.__init__`."""
    wrapped(*args, **kwargs)
    share_logging()  # vLLM has set its own up by now, which it had not when the seam was entered
    instance.__class__ = SmoaServingModels
    instance.begin()


def _check_name(name: str) -> None:
    """Raises AdapterError: no adapter can have this name."""
    reason = name_reason(name)
    if reason is not None:
        raise AdapterError(shown(name), reason)


def _not_loaded(name: str) -> AdapterNotFoundError:
    return AdapterNotFoundError(shown(name), "no adapter of this name is loaded")
