"""Mutated adapter files against everything that reads them: only errors meant for users may come out, and soon.

    python tests/fuzz/fuzz_readers.py --seconds 600 --keep tests/data/fuzz

Starts from one good adapter of each format. A file with a refusal not seen before (its reasons without names and
numbers) is a start for further mutations, and the smallest of its kind is kept in the folder. One that breaks a reader
is kept too, and ends the run with 1. The same --seed and --cases give the same files.
"""

import argparse
import base64
import gzip
import hashlib
import io
import json
import random
import re
import resource
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save, save_file

from smoa_serve.adapters import LoadOptions, load_adapter, open_adapter, write_portable
from smoa_serve.adapters.model import Adapter, AdapterKind, ModuleUpdate, OrderStatus
from smoa_serve.base.checkpoint import BaseCheckpoint
from smoa_serve.errors import SmoaError
from smoa_serve.offline.checkpoint import load_deltas
from smoa_serve.offline.inspect import inspect_adapter
from smoa_serve.store import AdapterStore

Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"
SHAPES = {Q: (6, 4), UP: (5, 6)}
CASE_LIMIT_S = 20.0  # of processor time
MEMORY_LIMIT_BYTES = 6 * 2**30  # beyond what is mapped at the start
KEPT_BYTES = 4096
OPTIONS = LoadOptions(allow_pickle=True, max_rank=64)


@dataclass(frozen=True)
class Case:
    """One adapter as files.

    Attributes:
        config: bytes of adapter_config.json.
        weights: bytes of the weight file.
        pickled: it is an adapter_model.bin.
    """

    config: bytes
    weights: bytes
    pickled: bool = False

    def write(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "adapter_config.json").write_bytes(self.config)
        name = "adapter_model.bin" if self.pickled else "adapter_model.safetensors"
        (folder / name).write_bytes(self.weights)
        return folder

    def to_json(self) -> str:
        parts = {"config": self.config, "weights": self.weights}
        packed = {name: base64.b64encode(gzip.compress(data, mtime=0)).decode() for name, data in parts.items()}
        return json.dumps(packed | {"pickled": self.pickled}) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Case":
        found = json.loads(text)
        config, weights = (gzip.decompress(base64.b64decode(found[name])) for name in ("config", "weights"))
        return cls(config, weights, found["pickled"])


class Readers:
    """Everything that reads an adapter file, on one tiny base.

    Args:
        folder: for files of a run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        generator = torch.Generator().manual_seed(0)
        base = folder / "base"
        base.mkdir()
        save_file(
            {f"{n}.weight": torch.randn(*s, generator=generator) for n, s in SHAPES.items()}, base / "model.safetensors"
        )
        (base / "config.json").write_text('{"model_type": "llama", "torch_dtype": "float32"}')
        self.base = BaseCheckpoint.open(base)
        self.store = AdapterStore(folder / "store")
        self.calls: dict[str, Callable[[Path], object]] = {
            "load with its base": lambda path: load_adapter(path, self.base, OPTIONS),
            "load alone": lambda path: load_adapter(path, None, OPTIONS),
            "inspect": lambda path: json.dumps(inspect_adapter(path, self.base, OPTIONS).as_json()).encode("utf-8"),
            "inspect alone": lambda path: inspect_adapter(path, None, OPTIONS),
            "verify": lambda path: open_adapter(path, OPTIONS).check(self.base),
            "slot rank": lambda path: open_adapter(path, OPTIONS).slot_rank(),
            "merge": lambda path: load_deltas(path, self.base, OPTIONS),
            "stage": lambda path: self.store.stage(self.store.open(path, OPTIONS), self.base),
        }

    def seeds(self) -> list[Case]:
        """A good adapter of each format, and one as a pickle."""
        generator = torch.Generator().manual_seed(1)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        def case(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Case:
            named = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
            return Case(json.dumps(config).encode(), save(named))

        shared = {"base_model_name_or_path": "b", "target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM"}
        hira = {
            f"{n}.hira_{x}": random(*((2, s[1]) if x == "A" else (s[0], 2))) for n, s in SHAPES.items() for x in "AB"
        }
        lora = {
            f"{n}.lora_{x}.weight": random(*((2, s[1]) if x == "A" else (s[0], 2)))
            for n, s in SHAPES.items()
            for x in "AB"
        }
        published = {}
        for name, (rows, cols) in SHAPES.items():
            for k, (m, n) in enumerate(zip(_halves(rows), _halves(cols), strict=True)):
                published |= {f"{name}.lora_A.{k}.weight": random(1, n), f"{name}.lora_B.{k}.weight": random(m, 1)}
        cases = [
            case(shared | {"peft_type": "HIRA", "r": 2, "rank_pattern": {"q_proj": 2}, "exclude_modules": ["x"]}, hira),
            case(
                shared | {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "rank_pattern": {}, "alpha_pattern": {}}, lora
            ),
            case(
                shared | {"peft_type": "SMOA", "r": 2, "num_blocks": 2, "lora_alpha": 2.0, "branch_ranks": [1, 1]},
                published,
            ),
            case({"peft_type": "SMOA", "lora_alpha": 2.0, "target_modules": r".*(q|up)_proj"}, published),
            self._portable(generator),
        ]
        buffer = io.BytesIO()
        torch.save(load(cases[0].weights), buffer)
        return [*cases, replace(cases[0], weights=buffer.getvalue(), pickled=True)]

    def _portable(self, generator: torch.Generator) -> Case:
        modules = {}
        for name, (rows, cols) in SHAPES.items():
            parts = [(torch.arange(n) % 2).short() for n in (rows, cols)]
            factors = torch.randn(1, cols, generator=generator), torch.randn(rows, 1, generator=generator)
            modules[name] = ModuleUpdate(*factors, *parts, (1, 1), 1.0, self.base.fingerprint(name))
        out = write_portable(
            Adapter(AdapterKind.SMOA, modules, 2, 2, 2.0, OrderStatus.RECORDED, "b", {"note": "x"}),
            self.folder / "portable",
        )
        return Case((out / "adapter_config.json").read_bytes(), (out / "adapter_model.safetensors").read_bytes())

    def run(self, case: Case) -> str:
        """What all readers say, without names and numbers.

        Raises:
            AssertionError: a reader raised something else, or took too long.
        """
        with tempfile.TemporaryDirectory(dir=self.folder) as temporary:
            path = case.write(Path(temporary) / "adapter")
            return " | ".join(self._call(name, call, path) for name, call in self.calls.items())

    def _call(self, name: str, call: Callable[[Path], object], path: Path) -> str:
        started = time.process_time()
        try:
            call(path)
            said = "taken"
        except SmoaError as error:
            text = str(error)
            text.encode("utf-8")
            said = re.sub(r"'[^']*'|\"[^\"]*\"|[\d.]+|model\S*|/\S*|\[[^\]]*\]", "", text.partition("\n")[2])[:400]
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            raise AssertionError(f"{name}: {type(error).__name__}: {str(error)[:500]}") from error
        took = time.process_time() - started
        assert took < CASE_LIMIT_S, f"{name} took {took:.0f} s"
        return f"{name}: {said}"


def _halves(size: int) -> tuple[int, int]:
    return (size + 1) // 2, size // 2


ODD: list[Any] = [
    *(None, True, False, "", "x", "\ud800", "\0", "a.b", ".", "..", "q_proj", "all-linear", "(", "(a*)*b", "🙂" * 50),
    *(0, 1, -1, 2, 3, 2**15, 2**31, 2**63, 2**64, 10**30, -(10**30), 0.5, -0.0, 1e300, 5e-324, 1e-30),
    *(
        [],
        {},
        [[]],
        [None],
        {"": None},
        ["q_proj"] * 200,
        list(range(200)),
        [[[[[[1]]]]]],
        {"q_proj": 1},
        {"(": 2},
        {"q_proj": "x"},
    ),
    *(
        "SMOA",
        "HIRA",
        "LORA",
        "smoa-serve-portable",
        "F64",
        "F8_E4M3",
        "BOOL",
        "I64",
        "BF16",
        "C64",
        [0, 0],
        [0, 8],
        [6, 4],
    ),
    *("(([a-z0-9]|[._])+)+!", "base_model.model.model.layers.0.self_attn.q_proj.lora_A.99999.weight"),
]


def mutate_json(value: Any, rng: random.Random) -> Any:
    """The same with one value replaced, removed, repeated or renamed, at a random depth."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        return _mutate_object(value, rng)
    if isinstance(value, list) and value and rng.random() < 0.6:
        index = rng.randrange(len(value))
        return [*value[:index], *rng.choice([[], [mutate_json(value[index], rng)], value * 3]), *value[index + 1 :]]
    if isinstance(value, int | float) and not isinstance(value, bool) and rng.random() < 0.5:
        return value + rng.choice([-1, 1, 2, -2, 0.5, 10**6])
    return rng.choice(ODD)


def _mutate_object(value: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    key = rng.choice(list(value))
    what = rng.random()
    if what < 0.15:
        return {k: v for k, v in value.items() if k != key}
    if what < 0.25:
        return {(str(rng.choice(ODD))[:300] if k == key else k): v for k, v in value.items()}
    if what < 0.35:
        return value | {f"{key}{rng.choice(['', '.0', 'x', '.default'])}": value[rng.choice(list(value))]}
    return value | {key: mutate_json(value[key], rng)}


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """Bits turned, a piece cut out, doubled, or replaced."""
    if not data:
        return bytes([rng.randrange(256)])
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        at, length = rng.randrange(len(changed) or 1), rng.choice([1, 2, 8, 64])
        what = rng.randrange(5)
        if what == 0 and changed:
            changed[at % len(changed)] ^= 1 << rng.randrange(8)
        elif what == 1:
            del changed[at : at + length]
        elif what == 2:
            changed[at:at] = changed[at : at + length]
        elif what == 3:
            changed[at : at + length] = rng.choice(
                [b"\xff" * 8, b"\0" * 8, b"[" * 2000, b'{"a":', b"NaN", b"1e999", b'"r":7,']
            )
        else:
            del changed[at:]
    return bytes(changed)


def mutate_config(case: Case, rng: random.Random) -> Case:
    """The configuration as JSON, or as bytes where it is none any more."""
    try:
        value = json.loads(case.config)
        for _ in range(rng.choice([1, 1, 2, 4])):
            value = mutate_json(value, rng)
        return replace(case, config=json.dumps(value, ensure_ascii=rng.random() < 0.7).encode("utf-8", "surrogatepass"))
    except (ValueError, RecursionError):
        return replace(case, config=mutate_bytes(case.config, rng))


def mutate_header(case: Case, rng: random.Random) -> Case:
    """The header of a safetensors file: names, dtypes, shapes and places."""
    try:
        (length,) = struct.unpack("<Q", case.weights[:8])
        header = mutate_json(json.loads(case.weights[8 : 8 + length]), rng)
        text = json.dumps(header).encode()
        claimed = len(text) if rng.random() < 0.9 else rng.choice([0, 1, len(text) - 1, 2**40, 2**63])
        return replace(case, weights=struct.pack("<Q", claimed) + text + case.weights[8 + length :])
    except (ValueError, struct.error, RecursionError):
        return replace(case, weights=mutate_bytes(case.weights, rng))


def mutate_tensors(case: Case, rng: random.Random) -> Case:
    """Good files with other tensors: cut, empty, of other dtypes, with numbers that are none, under other names."""
    try:
        tensors = dict(torch.load(io.BytesIO(case.weights), weights_only=True) if case.pickled else load(case.weights))
        name = rng.choice(list(tensors))
        tensor = tensors[name] if tensors[name].numel() < 10**6 else torch.zeros(2, 4)
    except Exception:  # no tensors any more: whatever it is that it raises
        return replace(case, weights=mutate_bytes(case.weights, rng))
    changes: list[Callable[[], object]] = [
        lambda: tensors.update({name: tensor[:-1]}),
        lambda: tensors.update({name: tensor[..., :0]}),
        lambda: tensors.update({name: tensor.new_zeros(0, 10**12)}),
        lambda: tensors.update({name: tensor.new_zeros(10**12, 0)}),
        lambda: tensors.update({name: tensor.reshape(-1)}),
        lambda: tensors.update({name: tensor.sum()}),
        lambda: tensors.update({name: tensor.t() if tensor.dim() == 2 else tensor}),
        lambda: tensors.update({name: torch.full(tensor.shape, rng.choice([float("nan"), float("inf"), 3e38, 1e-45]))}),
        lambda: tensors.update({name: tensor.double() * rng.choice([1, 1e200])}),
        lambda: tensors.update(
            {name: tensor.to(rng.choice([torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]))}
        ),
        lambda: tensors.update({name: tensor.new_zeros(1, 1).expand(10**6, 10**6) if case.pickled else tensor * 2}),
        lambda: tensors.update({name: tensor.to_sparse() if case.pickled else -tensor}),
        lambda: tensors.pop(name),
        lambda: tensors.update({name + rng.choice(["", ".x", "\n", "\ud800", "é", "x" * 2000]): tensor}),
        lambda: tensors.update(
            {name.replace(".0.", rng.choice([".1.", ".77777.", ".other.0.", "."])): tensors.pop(name)}
        ),
        lambda: tensors.update({name.replace("lora", "hira").replace(".weight", ""): tensors.pop(name)}),
    ]
    try:
        rng.choice(changes)()
        if case.pickled:
            buffer = io.BytesIO()
            torch.save(tensors, buffer)
            return replace(case, weights=buffer.getvalue())
        return replace(case, weights=save({key: tensor.contiguous().clone() for key, tensor in tensors.items()}))
    except (ValueError, RuntimeError, IndexError):  # what no file can hold
        return case


MUTATIONS = [mutate_config, mutate_config, mutate_header, mutate_tensors, mutate_tensors]


def mutate(case: Case, rng: random.Random) -> Case:
    """One to three mutations; now and then of plain bytes."""
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        if rng.random() < 0.1:
            part = rng.choice(["config", "weights"])
            case = replace(case, **{part: mutate_bytes(getattr(case, part), rng)})  # type: ignore[arg-type]
        else:
            case = rng.choice(MUTATIONS)(case, rng)
    return case


def fuzz(
    readers: Readers, rng: random.Random, cases: int, until: float = float("inf")
) -> tuple[int, dict[str, Case], list[tuple[Case, str]]]:
    """Run mutated cases.

    Returns:
        How many were run, the smallest case of each thing said, and the cases that broke a reader with what it raised.
    """
    pool = readers.seeds()
    known = {readers.run(case): case for case in pool}
    broken: list[tuple[Case, str]] = []
    done = 0
    while done < cases and time.monotonic() < until:
        case = mutate(rng.choice(pool), rng)
        done += 1
        try:
            said = readers.run(case)
        except AssertionError as error:
            broken.append((case, str(error)))
            continue
        if said not in known:
            pool.append(case)
        if said not in known or len(case.config + case.weights) < len(known[said].config + known[said].weights):
            known[said] = case
    return done, known, broken


def telling(known: dict[str, Case]) -> list[Case]:
    """Small cases that together have every reason of every reader."""
    seen: set[str] = set()
    kept = []
    for said, case in sorted(known.items(), key=lambda item: len(item[1].to_json())):
        reasons = {f"{part.partition(':')[0]}{line}" for part in said.split(" | ") for line in part.split("\n")}
        if not reasons <= seen and len(case.to_json()) < KEPT_BYTES:
            seen |= reasons
            kept.append(case)
    return kept


def main() -> int:
    """Run for a while, keep what is new."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--cases", type=int, default=10**9)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for the cases found")
    flags = parser.parse_args()
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY_LIMIT_BYTES,) * 2)
    with tempfile.TemporaryDirectory() as folder:
        readers = Readers(Path(folder))
        found = fuzz(readers, random.Random(flags.seed), flags.cases, time.monotonic() + flags.seconds)
    done, known, broken = found
    if flags.keep:
        flags.keep.mkdir(parents=True, exist_ok=True)
        for case in [*telling(known), *(case for case, _ in broken)]:
            text = case.to_json()
            (flags.keep / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json").write_text(text)
    print(f"{done} cases, {len(known)} different answers, {len(broken)} broke a reader")
    for what in sorted({what for _, what in broken}):
        print(f"  {what}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
