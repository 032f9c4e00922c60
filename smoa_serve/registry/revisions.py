"""Revisions: a name that users see, and the content behind it.

The engine knows an adapter as `<name>@<digest>`. Everything that vLLM keys by an adapter's name (prefix cache, batches,
statistics) is thereby keyed by content.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from smoa_serve.errors import shown
from smoa_serve.store import StagedAdapter

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

_DIGEST_LENGTH = 32
_ENGINE_NAME = re.compile(rf"(.+)@[0-9a-f]{{{_DIGEST_LENGTH}}}", re.DOTALL)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,255}")

Target = Literal["merge", "unmerge", "resident", "slot", "pin", "unpin"]  # of POST /v1/smoa/adapters/{name}/{target}
# What may follow a name in a path, now or soon: a name that ended so could be taken for another name and a verb.
VERBS = frozenset((*get_args(Target), "prefetch", "revisions", "rollback", "split"))


@dataclass(frozen=True)
class Revision:
    """One content of one adapter name.

    Attributes:
        name: what users put into `model`.
        lora_int_id: the engine's number for it; the same whenever this content has this name.
        staged: what was read and where its private copy lies.
        requested_path: the path as the user gave it.
        origin: where it was read.
    """

    name: str
    lora_int_id: int
    staged: StagedAdapter
    requested_path: str
    origin: Path

    @property
    def engine_name(self) -> str:
        """What the engine calls it."""
        return engine_name(self.name, self.staged.digest)

    def request(self) -> "LoRARequest":
        """What the engine is asked with."""
        from vllm.lora.request import LoRARequest

        return LoRARequest(lora_name=self.engine_name, lora_int_id=self.lora_int_id, lora_path=str(self.staged.path))


def engine_name(name: str, digest: str) -> str:
    """What the engine calls a content under a name."""
    return f"{name}@{digest[:_DIGEST_LENGTH]}"


def visible_name(engine_name: str) -> str:
    """The name that users know, from the engine's."""
    match = _ENGINE_NAME.fullmatch(engine_name)
    return match[1] if match else engine_name


def name_reason(name: str) -> str | None:
    """Why a name cannot be an adapter's, None when it can.

    Every route has to reach it, through clients and proxies that tidy paths up, and it may lead no resolver out of its
    folder.
    """
    unusable = f"the adapter name {shown(name)} cannot be used; "
    if not _NAME.fullmatch(name):
        return (
            f"{unusable}allowed are up to 256 letters, digits and . _ : / - beginning with a letter or digit "
            "(@ stands between a name and a digest)"
        )
    segments = name.split("/")
    if not {"", ".", ".."}.isdisjoint(segments):
        return f"{unusable}between its slashes allowed are no '.', no '..' and not nothing: paths are shortened by them"
    if segments[-1] in VERBS:
        return f"{unusable}allowed are all last parts but {', '.join(sorted(VERBS))}: routes end in these"
    return None


def default_mm_reason(lora_config: Any) -> str | None:
    """Why vLLM's adapters by modality cannot be served; None where none are configured. vLLM looks for an adapter whose
    engine name is the modality, finds none, and would answer with the base model.

    Args:
        lora_config: vLLM's.
    """
    if lora_config is None or not lora_config.default_mm_loras:
        return None
    names = ", ".join(sorted(lora_config.default_mm_loras))
    return f"--default-mm-loras ({names}) is not supported: name these adapters in --lora-modules and let requests ask"
