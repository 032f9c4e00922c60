"""What fuzzing found: every kept file, and a short run of new ones, against everything that reads adapters."""

import importlib.util
import random
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parents[1]
CORPUS = sorted((HERE / "data" / "fuzz").glob("*.json"))


@pytest.fixture(scope="module")
def fuzzing() -> Any:
    """The program; test folders are no packages, so it is loaded by its path."""
    spec = importlib.util.spec_from_file_location("fuzz_readers", HERE / "fuzz" / "fuzz_readers.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def readers(fuzzing: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return fuzzing.Readers(tmp_path_factory.mktemp("fuzz"))


def test_good_files_are_taken_and_found_ones_are_there(fuzzing: Any, readers: Any) -> None:
    assert len(CORPUS) >= 100
    for case in readers.seeds():
        assert "load with its base: taken" in readers.run(case) or b"LORA" in case.config


def test_every_file_that_fuzzing_found_is_answered_for_users(fuzzing: Any, readers: Any) -> None:
    answers = {readers.run(fuzzing.Case.from_json(file.read_text())) for file in CORPUS}
    assert len(answers) > len(CORPUS) / 2


def test_new_files_are_answered_for_users(fuzzing: Any, readers: Any) -> None:
    done, known, broken = fuzzing.fuzz(readers, random.Random(20), 300)
    assert (done, broken) == (300, [])
    assert len(known) > 50


def test_a_reader_that_breaks_is_noticed(fuzzing: Any, readers: Any) -> None:
    def breaks(path: Path) -> None:
        raise KeyError("bug")

    (case, *_) = readers.seeds()
    with pytest.raises(AssertionError, match="inspect: KeyError: 'bug'"):
        readers._call("inspect", breaks, case.write(readers.folder / "case"))
