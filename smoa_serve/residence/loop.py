"""The automatic policy at work: looks at the traffic every few seconds, moves adapters, says what it did last."""

import asyncio
import logging
from collections import deque
from datetime import UTC, datetime
from typing import Any

from smoa_serve.engine.messages import Residence, WorkerStatus, on_all_workers
from smoa_serve.errors import MoveAbandonedError, MoveFailedError, MoveRefusedError
from smoa_serve.registry.revisions import Revision
from smoa_serve.residence.engine_client import served
from smoa_serve.residence.ladder import BYTES, STEP, Ladder
from smoa_serve.residence.policy import MAX_LOST, Action, Decision, Load, Others, Policy, PolicySettings, Rates
from smoa_serve.settings import Settings

logger = logging.getLogger(__name__)

REMEMBERED = 20
CPU_MIB = 1024


class LadderLoop:
    """Runs the policy of one server.

    Args:
        engine: vLLM's client.
        ladder: does the moves.
        settings: of the server.

    Attributes:
        rates: tokens per step.
        decisions: the last ones, newest first, with what came of them.
    """

    def __init__(self, engine: Any, ladder: Ladder, settings: Settings) -> None:
        self._engine, self._ladder, self._settings = engine, ladder, settings.residence
        self.rates, self._alone, self._alone_steps = Rates(), Rates(), Rates()
        self.decisions: deque[dict[str, str]] = deque(maxlen=REMEMBERED)
        self._policy: Policy | None = None
        # (engine name, action): what was refused for what the adapter is, not for how things are at the time.
        self._refused: set[tuple[str, Action]] = set()
        self._asked = 0
        self._shown: set[str] = set()

    @property
    def allowed(self) -> PolicySettings:
        """What the settings of this server let the policy do."""
        mib = self._settings.ladder_mib
        if mib is None:
            mib = CPU_MIB if self._engine.vllm_config.device_config.device_type == "cpu" else 0
        return PolicySettings(self._settings.auto_merge, self._settings.auto_resident, mib << 20)

    async def run(self, state: Any) -> None:
        """Until the server ends.

        Args:
            state: of the API server; names vLLM's registry of models.
        """
        while True:
            await asyncio.sleep(self._settings.policy_interval_s)
            if self._idle():
                continue  # workers that are woken spin for a while
            try:
                await self.look(state.openai_serving_models.revisions)
            except Exception:
                if self._engine.errored:
                    return  # which vLLM reports itself
                logger.exception("The residence policy failed; it tries again")

    def _idle(self) -> bool:
        """Whether nothing was asked since the last look, and nothing runs."""
        asked, before = served(self._engine).total(), self._asked
        self._asked = asked
        return asked == before and not self._engine.output_processor.request_states

    async def look(self, revisions: dict[str, Revision]) -> None:
        """One interval: measure, decide, move."""
        statuses = await self._ladder.statuses()
        status = statuses[0]
        if status.cost is None or status.refusal:
            return
        ran = self.rates.observe(status.steps, status.counts("tokens"))
        self._alone.observe(status.steps, status.counts("alone"))
        self._alone_steps.observe(status.steps, status.counts("alone_steps"))
        loads = [self._load(revision, statuses) for revision in revisions.values() if revision.staged.kind.modulates]
        self._show(loads, statuses, revisions)
        if not ran:
            return
        if self._policy is None:
            self._policy = Policy(self.allowed, status.cost, switches_freely=status.switches_freely)
        here = {revision.engine_name for revision in revisions.values()}
        self._refused = {(name, action) for name, action in self._refused if name in here}
        for decision in self._policy.decide(loads, self.rates.all, _others(revisions, statuses)):
            # Moves take their time, and what was decided about may be gone or be another by now.
            revision = revisions.get(decision.name)
            if revision is not None:
                await self._act(decision, revision)

    def _load(self, revision: Revision, statuses: list[WorkerStatus]) -> Load:
        number = revision.lora_int_id
        here = on_all_workers(statuses, number)
        weights = sum(status.weight_bytes for status in statuses)
        return Load(
            name=revision.name,
            residence=here.residence,
            tokens=self.rates.tokens.get(number, 0.0),
            alone=self._alone.tokens.get(number, 0.0),
            alone_steps=self._alone_steps.tokens.get(number, 0.0),
            rank=revision.staged.max_rank,
            num_blocks=revision.staged.num_blocks,
            resident_bytes=here.block_bytes,
            merged_bytes=weights + here.block_bytes,
            movable=revision.name not in self._ladder.pinned,
            refused=frozenset(action for name, action in self._refused if name == revision.engine_name),
        )

    def _show(self, loads: list[Load], statuses: list[WorkerStatus], revisions: dict[str, Revision]) -> None:
        """Metrics of every adapter, and none of those that are gone."""
        for name in self._shown - {load.name for load in loads}:
            STEP.remove(name)
            BYTES.remove(name)
        for load in loads:
            STEP.labels(load.name).set(load.residence.rung)
            BYTES.labels(load.name).set(on_all_workers(statuses, revisions[load.name].lora_int_id).resident_bytes)
        self._shown = {load.name for load in loads}

    async def _act(self, decision: Decision, revision: Revision) -> None:
        def wanted() -> bool:
            return decision.name not in self._ladder.pinned

        try:
            match decision.action:
                case "merge":
                    move = await self._ladder.merge(revision, self._settings.others_get, MAX_LOST, wanted)
                case "resident":
                    move = await self._ladder.make_resident(revision, wanted)
                case "unmerge" | "slot":
                    move = await self._ladder.to_slot(revision)
            came = f"{move.residence} after {move.seconds:.1f} s"
        except MoveAbandonedError as error:
            came = str(error)
        except MoveRefusedError as error:
            if error.lasting:
                self._refused.add((revision.engine_name, decision.action))
            came = f"refused: {error}"
        except MoveFailedError as error:
            came = str(error)
        logger.info("Policy: %s %s (%s): %s", decision.action, decision.name, decision.reason, came)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        self.decisions.appendleft({"time": now, **vars(decision), "result": came})


def _others(revisions: dict[str, Revision], statuses: list[WorkerStatus]) -> Others:
    """What the workers hold for revisions that cannot be asked for any more."""
    known = {revision.lora_int_id for revision in revisions.values()}
    others = [one for status in statuses for number, one in status.adapters.items() if number not in known]
    merged = any(one.residence is Residence.MERGED for one in others)
    return Others(sum(one.resident_bytes for one in others), merged)
