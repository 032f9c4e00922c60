"""Make a virtual environment with what this machine needs: the CUDA engine where there is a GPU, else the CPU engine.

Standard library only: this runs before anything is installed. A second run with nothing changed returns at once; a run
that was cut short goes on where it stopped.

    python scripts/setup_env.py [--venv DIR] [--device auto|cuda|cpu] [--vllm VERSION] [--peft VERSION]
                                [--groups NAME,...] [--extras NAME,...] [--locked] [--force]

Environment: SMOA_VENV, SMOA_DEVICE, SMOA_VLLM_VERSION ("0.28", "0.28.*" or "0.28.1"), SMOA_PEFT_VERSION,
SMOA_TORCH_INDEX_URL, SMOA_LOCKED.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import setup_plan as plan

ROOT = Path(__file__).resolve().parent.parent
HEARTBEAT_S = 20.0
TAIL_LINES = 30


class Log:
    """What pip and uv say goes into one file; the terminal gets a line per step."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def run(self, command: list[str], env: dict[str, str] | None = None) -> int:
        """Run `command` with its output appended to the log; says every 20 s that it is still at work."""
        with self.path.open("a", encoding="utf-8") as out:
            out.write(plan.masked(f"\n$ {' '.join(command)}\n"))
            out.flush()
            process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=env, cwd=ROOT)
            started = time.monotonic()
            while True:
                try:
                    status = process.wait(timeout=HEARTBEAT_S)
                    self._mask(command)
                    return status
                except subprocess.TimeoutExpired:
                    print(f"        still at it, {time.monotonic() - started:.0f} s", flush=True)
                except KeyboardInterrupt:
                    process.terminate()
                    process.wait()
                    self._mask(command)
                    raise

    def _mask(self, command: list[str]) -> None:
        """Take out what pip and uv may have repeated of the credentials in their arguments."""
        text = self.path.read_text(encoding="utf-8", errors="replace")
        masked = plan.masked(text)
        for secret in plan.credentials(command):
            masked = masked.replace(secret, "***")
        if masked != text:
            self.path.write_text(masked, encoding="utf-8")

    def note(self, text: str) -> None:
        with self.path.open("a", encoding="utf-8") as out:
            out.write(plan.masked(text) + "\n")

    def tail(self) -> str:
        return "\n".join(self.path.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL_LINES:])


class Step:
    """Prints what is done and how long it took."""

    def __init__(self, what: str) -> None:
        self.what = what

    def __enter__(self) -> Step:
        print(f"  ... {self.what}", flush=True)
        self.started = time.monotonic()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            print(f"  ok  {self.what} ({time.monotonic() - self.started:.1f} s)", flush=True)


def has_cuda() -> bool:
    """Whether the NVIDIA driver answers and knows at least one GPU."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return False
    try:
        listing = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listing.returncode == 0 and "GPU" in listing.stdout


def reachable(url: str, timeout_s: float = 3.0) -> bool:
    """Whether an index answers in time: an unreachable one makes pip retry for minutes."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=timeout_s):
            return True
    except urllib.error.HTTPError as error:
        return error.code in (401, 403, 405)
    except (OSError, ValueError):
        return False


def python_works(python: Path) -> bool:
    """Whether the environment exists and runs the same Python as this script."""
    if not python.exists():
        return False
    probe = [str(python), "-c", "import sys, pip; print(sys.version_info[:2])"]
    found = subprocess.run(probe, capture_output=True, text=True, check=False)
    return found.returncode == 0 and found.stdout.strip() == str(sys.version_info[:2])


def pip_config(python: Path) -> dict[str, str]:
    """The user's own pip settings (mirrors, local wheels, certificates), so that uv can honour them."""
    listing = subprocess.run([str(python), "-m", "pip", "config", "list"], capture_output=True, text=True, check=False)
    return plan.parse_pip_config(listing.stdout)


def extra_indexes(device: str) -> list[str]:
    """PyTorch's index of CPU wheels, when it is needed and answers."""
    if device != "cpu" or platform.system() != "Linux":
        return []
    url = os.environ.get("SMOA_TORCH_INDEX_URL", plan.TORCH_CPU_INDEX)
    if reachable(url):
        return [url]
    print(f"      {plan.masked(url)} does not answer: the CPU build of torch has to come from pip's own configuration")
    return []


def install(python: Path, wanted: plan.Plan, log: Log) -> None:
    """Install the project and the engine: with uv, four times as fast; with pip where uv cannot.

    Raises:
        SystemExit: both failed; shows the end of the log.
    """
    indexes = extra_indexes(wanted.device)
    if log.run([str(python), "-m", "pip", "install", "-q", "uv"]) == 0:
        overrides = python.parent.parent / "setup-overrides.txt"
        overrides.write_text(plan.overrides(wanted.device), encoding="utf-8")
        config = pip_config(python)
        command = plan.uv_command(python, wanted, config, indexes, overrides)
        if log.run(command, env=plan.uv_environment(os.environ, config)) == 0:
            return
        print("      uv could not install it, trying pip (slower)")
    if log.run(plan.pip_command(python, wanted, indexes)) != 0:
        fail(f"the installation of {wanted.target} failed", log)


def remove_broken(python: Path, log: Log) -> None:
    """Uninstall members of the torchvision family whose import fails: they break `import transformers`."""
    site = plan.site_packages(python.parent.parent)
    results = {}
    for name in (name for name in plan.VISION if (site / name).is_dir()):
        probe = subprocess.run([str(python), "-c", f"import {name}"], capture_output=True, text=True, check=False)
        results[name] = probe.returncode == 0
        log.note(f"import {name}: {'ok' if results[name] else probe.stderr.strip()[-800:]}")
    broken = plan.broken_imports(results)
    if broken:
        print(
            f"      {', '.join(broken)} cannot be imported beside this torch: removed (text serving needs none of them)"
        )
        if log.run([str(python), "-m", "pip", "uninstall", "-y", "-q", *broken]) != 0:
            fail(f"{', '.join(broken)} could not be removed", log)


def verify(python: Path, device: str, log: Log) -> None:
    """Start what the server starts: transformers, vLLM's platform detection and its `vllm` command line."""
    if log.run([str(python), "-c", plan.VERIFY, device]) != 0:
        fail("the environment was installed, but vLLM does not start in it", log)


def fail(what: str, log: Log) -> None:
    """End with the log's tail.

    Raises:
        SystemExit: always.
    """
    print(log.tail(), file=sys.stderr)
    raise SystemExit(f"setup: {what}; the end of {log.path} is above. Repair the cause and run it again.")


def where(venv: Path) -> str:
    """How the command is found."""
    near = os.path.relpath(venv)
    shown = str(venv) if near.startswith("..") else near
    return f"the command is {shown}/bin/smoa-serve; for smoa-serve alone: source {shown}/bin/activate"


def set_up(wanted: plan.Plan, venv: Path, *, force: bool, check: bool) -> None:
    """Bring `venv` to what `wanted` says."""
    stamp = venv / "setup-stamp.json"
    inputs = [
        ROOT / "pyproject.toml",
        *([plan.LOCK] if wanted.locked else []),
        *sorted(Path(__file__).parent.glob("setup_*.py")),
    ]
    digest = plan.stamp_digest([path.read_bytes() for path in inputs], wanted, sys.version, str(venv))
    if not force and plan.stamp_matches(stamp, digest) and (venv / "bin" / "python").exists():
        print(f"setup: {venv.name} is up to date ({wanted.target}); {where(venv)}")
        return
    started = time.monotonic()
    python = venv / "bin" / "python"
    print(f"setup: {venv.name} gets {wanted.target} on Python {platform.python_version()}", flush=True)
    if not python_works(python):
        with Step("virtual environment"):
            subprocess.run([sys.executable, "-m", "venv", "--clear", str(venv)], check=True)
    stamp.unlink(missing_ok=True)
    log = Log(venv / "setup.log")
    log.path.write_text(f"{wanted}\n{sys.version}\n", encoding="utf-8")
    with Step(f"packages (log: {log.path})"):
        install(python, wanted, log)
        remove_broken(python, log)
        if wanted.device == "cpu":
            log.note(f"alias metadata: {plan.write_alias(plan.site_packages(venv))}")
    if check:
        with Step("check that vLLM starts"):
            verify(python, wanted.device, log)
    took = time.monotonic() - started
    stamp.write_text(
        json.dumps({"digest": digest, "target": wanted.target, "seconds": round(took, 1)}), encoding="utf-8"
    )
    print(f"setup: done in {took:.0f} s; {where(venv)}")


def main(arguments: list[str] | None = None) -> None:
    """Read flags and environment, then set up.

    Raises:
        SystemExit: wrong Python or settings, or a step failed.
    """
    plan.require_python(sys.version_info[:2], sys.executable)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, default=Path(os.environ.get("SMOA_VENV", ".venv")))
    parser.add_argument("--device", choices=["auto", "cuda", "cpu"], default=os.environ.get("SMOA_DEVICE", "auto"))
    parser.add_argument("--vllm", default=os.environ.get("SMOA_VLLM_VERSION"), help="engine version to pin")
    parser.add_argument("--peft", default=os.environ.get("SMOA_PEFT_VERSION"), help="PEFT version to pin")
    parser.add_argument("--groups", default="dev", help="dependency groups, separated by commas; none in an image")
    parser.add_argument("--extras", default="", help="extras beside the engine's own, separated by commas")
    parser.add_argument("--no-editable", action="store_true", help="install a copy instead of linking this checkout")
    parser.add_argument(
        "--locked",
        action="store_true",
        default=os.environ.get("SMOA_LOCKED", "") not in ("", "0"),
        help="hold all packages to the versions of requirements.lock",
    )
    parser.add_argument("--force", action="store_true", help="install even if nothing changed")
    parser.add_argument("--no-verify", action="store_true", help="do not start vLLM (no GPU at image build)")
    flags = parser.parse_args(arguments)
    device = plan.choose_device(flags.device, has_cuda)
    import tomllib  # comes with Python 3.11

    groups = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["dependency-groups"]
    tools = plan.group_requirements(groups, plan.names_in(flags.groups))
    editable = not flags.no_editable
    wanted = plan.make_plan(
        ROOT, device, flags.vllm, flags.extras, editable=editable, peft=flags.peft, tools=tools, locked=flags.locked
    )
    venv = flags.venv if flags.venv.is_absolute() else ROOT / flags.venv
    set_up(wanted, Path(os.path.abspath(venv)), force=flags.force, check=not flags.no_verify)


if __name__ == "__main__":
    main()
