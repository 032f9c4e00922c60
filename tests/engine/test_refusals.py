"""Adapters that cannot be served: refused over HTTP with every reason, and the server goes on."""

import json
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

PROMPT = [13, 97, 88, 114, 5, 31, 64]
Q0, V1 = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"
LORA_Q0 = f"base_model.model.{Q0}"


@pytest.fixture
def goes_on(tiny: Any) -> Any:
    """After the test nothing is loaded that was not before, and the server answers as it did."""
    before = {name: entry["digest"] for name, entry in tiny.server.adapters().items()}
    yield
    assert {name: entry["digest"] for name, entry in tiny.server.adapters().items()} == before
    for model in ("base-model", "smoa-r8-k2", "hira-r4", "lora-r4"):
        assert tiny.ask(model, PROMPT).differs(tiny.solo(model, PROMPT)) is None


pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("goes_on")]


def assert_refused(tiny: Any, path: Path | str, *reasons: str, status: int = 400, name: str = "refused") -> str:
    """Load it, and look for the reasons in the one message (vLLM takes absolute paths out of it)."""
    response = tiny.load(name, path)
    if response.status_code == 200:
        tiny.unload(name)
    assert response.status_code == status, response.text
    message = str(response.json()["error"]["message"])
    for reason in reasons:
        assert reason in message
    return message


def changed_copy(
    source: Path, out: Path, change: Callable[[dict[str, Tensor]], None], config: Mapping[str, Any] = {}
) -> Path:
    """The adapter `source` with other tensors or other configuration."""
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(source, out)
    tensors = {name: tensor.clone() for name, tensor in load_file(source / "adapter_model.safetensors").items()}
    change(tensors)
    save_file(tensors, out / "adapter_model.safetensors")
    written = json.loads((out / "adapter_config.json").read_text()) | config
    (out / "adapter_config.json").write_text(json.dumps(written))
    return out


def spoil_two(tensors: dict[str, Tensor]) -> None:
    tensors[f"{Q0}.smoa_a"][0, 0] = float("nan")
    tensors[f"{V1}.smoa_b"][0, 0] = float("inf")


def cut_two(tensors: dict[str, Tensor]) -> None:
    tensors[f"{Q0}.smoa_a"] = tensors[f"{Q0}.smoa_a"][:, :-1].contiguous()
    tensors[f"{V1}.smoa_b"] = tensors[f"{V1}.smoa_b"][:-1].contiguous()


def lose_two(tensors: dict[str, Tensor]) -> None:
    del tensors[f"{Q0}.smoa_a"], tensors[f"{V1}.smoa_row_block"]


def keep(tensors: dict[str, Tensor]) -> None:
    """As it is."""


@pytest.mark.parametrize("change", [spoil_two, cut_two, lose_two])
def test_bad_tensors_are_all_named(tiny: Any, change: Callable[[dict[str, Tensor]], None]) -> None:
    path = changed_copy(tiny.adapters["smoa-r8-k2"].path, tiny.root / "bad-tensors", change)
    assert_refused(tiny, path, Q0, V1)


def test_numbers_changed_after_they_were_written_are_noticed(tiny: Any) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"{Q0}.smoa_b"] += 1e-3 * (tensors[f"{Q0}.smoa_b"] != 0)

    path = changed_copy(tiny.adapters["smoa-r8-k2"].path, tiny.root / "changed", change)
    assert_refused(tiny, path, "digest", "changed or damaged")


def test_unknown_targets_are_all_named(tiny: Any, renamed: Callable[..., Path]) -> None:
    names = {Q0: "model.layers.0.self_attn.z_proj", V1: "model.layers.7.self_attn.v_proj"}
    assert_refused(tiny, renamed("unknown-target", names), *names.values())


def test_modules_of_another_shape_are_refused(tiny: Any, renamed: Callable[..., Path]) -> None:
    assert_refused(tiny, renamed("other-shape", {Q0: V1, V1: Q0}), Q0, V1)


def test_an_adapter_of_another_base_is_refused_for_every_module(tiny: Any, rewritten: Callable[..., Path]) -> None:
    def other(modules: dict[str, Any]) -> dict[str, Any]:
        return {name: replace(m, base=replace(m.base, sha256="0" * 64)) for name, m in modules.items()}

    message = assert_refused(tiny, rewritten("other-base", other), Q0, V1)
    assert "base" in message
    assert message.count("model.layers.") == len(tiny.adapters["smoa-r8-k2"].deltas)


def test_a_rank_over_the_limit_names_the_limit_and_the_flag(tiny: Any) -> None:
    adapter = tiny.make("too-wide", seed=50, rank=18, num_blocks=2)
    assert_refused(tiny, adapter.path, "9", "8", "--max-lora-rank")


def test_a_total_rank_over_the_limit_is_fine_when_every_branch_fits(tiny: Any) -> None:
    assert tiny.adapters["smoa-r16-k4"].rank > 8
    assert "smoa-r16-k4" in tiny.server.adapters()


def test_a_lora_over_the_limit_is_refused(tiny: Any) -> None:
    def widen(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            dim = 0 if "lora_A" in name else 1
            tensors[name] = torch.cat([tensors[name]] * 3, dim=dim)

    path = changed_copy(tiny.adapters["lora-r4"].path, tiny.root / "wide-lora", widen, {"r": 12})
    assert_refused(tiny, path, "rank 12", "--max-lora-rank")


@pytest.mark.parametrize("peft_type", ["LORA", "HIRA"])
def test_a_published_smoa_file_under_another_peft_type_is_refused(tiny: Any, vectors: Path, peft_type: str) -> None:
    source = vectors / "e2e/tiny-llama/adapters/qv_r8_k2_safetensors"
    path = changed_copy(source, tiny.root / f"lying-{peft_type}", keep, {"peft_type": peft_type})
    assert_refused(tiny, path, "num_blocks")


def test_a_lora_file_that_says_smoa_is_refused(tiny: Any) -> None:
    config = {"peft_type": "SMOA", "num_blocks": 2}
    path = changed_copy(tiny.adapters["lora-r4"].path, tiny.root / "lying-smoa", keep, config)
    assert_refused(tiny, path)


@pytest.mark.parametrize("peft_type", [None, "smoa", "VERA", 7])
def test_a_kind_that_is_not_served_is_refused(tiny: Any, peft_type: Any) -> None:
    path = changed_copy(tiny.adapters["lora-r4"].path, tiny.root / "kind", keep, {"peft_type": peft_type})
    assert_refused(tiny, path, "peft_type", "HIRA, LORA, SMOA")


def test_bad_lora_tensors_are_all_named(tiny: Any) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"{LORA_Q0}.lora_A.weight"][0, 0] = float("nan")
        name = f"base_model.model.{V1}.lora_B.weight"
        tensors[name] = tensors[name][:-1].contiguous()

    assert_refused(tiny, changed_copy(tiny.adapters["lora-r4"].path, tiny.root / "bad-lora", change), Q0, V1)


def test_a_lora_on_the_output_head_is_refused(tiny: Any) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["base_model.model.lm_head.lora_A.weight"] = torch.randn(4, 128)
        tensors["base_model.model.lm_head.lora_B.weight"] = torch.randn(128, 4)

    assert_refused(tiny, changed_copy(tiny.adapters["lora-r4"].path, tiny.root / "head-lora", change), "head")


def test_a_lora_for_a_module_that_the_base_lacks_is_refused(tiny: Any) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["base_model.model.model.layers.0.self_attn.z_proj.lora_A.weight"] = torch.randn(4, 128)
        tensors["base_model.model.model.layers.0.self_attn.z_proj.lora_B.weight"] = torch.randn(128, 4)

    assert_refused(tiny, changed_copy(tiny.adapters["lora-r4"].path, tiny.root / "partial-lora", change), "z_proj")


def test_a_configuration_key_that_may_change_the_maths_is_refused(tiny: Any, vectors: Path) -> None:
    source = vectors / "e2e/tiny-llama/adapters/qv_r8_k2_safetensors"
    config = {"new_scaling": 3, "bias": "all", "modules_to_save": ["lm_head"]}
    path = changed_copy(source, tiny.root / "unknown-key", keep, config)
    assert_refused(tiny, path, "new_scaling", "bias", "lm_head")


def test_a_torn_or_foreign_file_is_refused(tiny: Any) -> None:
    path = changed_copy(tiny.adapters["smoa-r8-k2"].path, tiny.root / "torn", keep)
    weights = path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert_refused(tiny, path, "cannot be read")
    (path / "adapter_config.json").write_text("{")
    assert_refused(tiny, path, "cannot be read")
    (path / "adapter_config.json").unlink()
    assert_refused(tiny, path, "there is no")


def test_a_pickle_that_does_more_than_hold_tensors_is_not_run(tiny: Any, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "run",))

    path = changed_copy(tiny.adapters["lora-r4"].path, tiny.root / "trap", keep)
    (path / "adapter_model.safetensors").unlink()
    torch.save({"x": Trap()}, path / "adapter_model.bin")
    assert_refused(tiny, path, "cannot be read as a dictionary of tensors")
    assert not (tmp_path / "run").exists()


FREEZING = r"(?:[a-z._0-9]+){1,1000}(?!.)\bx?y"  # no engine ends on it without a limit


@pytest.mark.parametrize(
    ("adapter", "config"),
    [
        ("hira", {"target_modules": FREEZING}),
        ("hira", {"exclude_modules": FREEZING}),
        ("hira", {"target_modules": "(([a-z0-9]|[._])+)+!"}),
        ("lora-r4", {"rank_pattern": {FREEZING: 4}}),
        ("lora-r4", {"alpha_pattern": {FREEZING: 4}}),
    ],
)
def test_an_expression_that_never_ends_does_not_stop_the_server(
    tiny: Any, vectors: Path, adapter: str, config: dict[str, Any]
) -> None:
    if adapter == "hira":
        path = tiny.root / "freezing-hira"
        path.mkdir(exist_ok=True)
        h_out, h_in = tiny.adapters["smoa-r8-k2"].deltas[Q0].shape
        factors = {"hira_A": torch.randn(2, h_in), "hira_B": torch.randn(h_out, 2)}
        save_file({f"{LORA_Q0}.{n}": t for n, t in factors.items()}, path / "adapter_model.safetensors")
        written = {"peft_type": "HIRA", "r": 2, "target_modules": ["q_proj"]} | config
        (path / "adapter_config.json").write_text(json.dumps(written))
    else:
        path = changed_copy(tiny.adapters[adapter].path, tiny.root / "freezing-lora", keep, config)
    answers = []
    with ThreadPoolExecutor(1) as pool:
        load = pool.submit(tiny.load, "freezing", path)
        while not load.done():
            answers.append(tiny.ask("smoa-r8-k2", PROMPT).differs(tiny.solo("smoa-r8-k2", PROMPT)))
    assert load.result().status_code == 400, load.result().text
    message = load.result().json()["error"]["message"]
    assert "is refused: matching it" in message or "names no linear layer of the base" in message
    assert set(answers) == {None}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 100_000, "nested deeper"),
        ('{"peft_type": "HIRA", "r": 2, "target_modules": ["\\ud800"]}', "surrogate"),
        ('{"r": 2, "r": 4}', "twice"),
        ("{" + ",".join(f'"k{i}": 1' for i in range(200_000)) + "}", "200000 entries"),
    ],
    ids=["deep", "surrogate", "twice", "long"],
)
def test_a_configuration_that_no_trainer_writes_is_refused(tiny: Any, text: str, reason: str) -> None:
    path = changed_copy(tiny.adapters["smoa-r8-k2"].path, tiny.root / "odd-config", keep)
    (path / "adapter_config.json").write_text(text)
    assert_refused(tiny, path, reason)


def test_numbers_that_overflow_as_they_are_served_are_refused(tiny: Any, rewritten: Callable[..., Path]) -> None:
    def grow(modules: dict[str, Any]) -> dict[str, Any]:
        wide = replace(modules[Q0], a=modules[Q0].a.double() * 1e200, b=modules[Q0].b.double())
        return modules | {Q0: wide, V1: replace(modules[V1], scaling=1e300)}

    def scale(modules: dict[str, Any]) -> dict[str, Any]:
        return modules | {V1: replace(modules[V1], scaling=1e300)}

    assert_refused(tiny, rewritten("beyond-float32", grow), Q0, "too large for float32")
    assert_refused(tiny, rewritten("scaled-to-inf", scale), V1, "not finite in float32")


def test_a_store_that_cannot_be_written_refuses_with_the_remedy_and_goes_on(tiny: Any) -> None:
    variables = Path(f"/proc/{tiny.server.process.pid}/environ").read_text().split("\0")
    (store,) = (Path(value.partition("=")[2]) for value in variables if value.startswith("SMOA_STORE_DIR="))
    path = tiny.make("not-stored", seed=51).path
    aside = store.rename(store.with_name("aside"))
    store.write_text("no folder")
    try:
        assert_refused(tiny, path, "cannot be written", "set SMOA_STORE_DIR to another folder", status=507)
    finally:
        store.unlink()
        aside.rename(store)
    assert tiny.load("not-stored", path).status_code == 200
    assert tiny.unload("not-stored").status_code == 200


def test_a_weight_file_beside_a_link_out_of_the_roots_is_refused(tiny: Any, tmp_path: Path) -> None:
    path = changed_copy(tiny.adapters["smoa-r8-k2"].path, tiny.root / "file-and-link", keep)
    config = path / "adapter_config.json"
    shutil.move(config, tmp_path / "outside.json")
    config.symlink_to(tmp_path / "outside.json")
    assert_refused(tiny, path / "adapter_model.safetensors", status=403)
    assert_refused(tiny, f"{path.name}/adapter_model.safetensors", status=403)


def test_a_missing_folder_is_a_404(tiny: Any) -> None:
    assert_refused(tiny, tiny.root / "nowhere", "there is nothing at this path", status=404)
    assert_refused(tiny, "nowhere", "'nowhere'", "there is nothing at this path", status=404)


def test_paths_outside_the_roots_are_forbidden_and_tell_nothing(tiny: Any, tmp_path: Path) -> None:
    inside = tiny.adapters["smoa-r8-k2"].path
    outside = tmp_path / "outside"
    shutil.copytree(inside, outside)
    link, loop = tiny.root / "link-out", tiny.root / "loop"
    link.symlink_to(outside)
    loop.symlink_to(loop)
    paths = [
        outside,
        tmp_path / "nothing",
        link,
        "link-out",
        f"{inside.name}/../{inside.name}",
        f"../{tiny.root.name}/{inside.name}",
        f"{tiny.root}/../{tiny.root.name}/{inside.name}",
        "/etc/passwd",
        "~",
    ]
    try:
        for path in paths[:-1]:
            message = assert_refused(tiny, path, "outside", status=403)
            assert str(tmp_path) not in message.replace(str(path), "")
        assert_refused(tiny, paths[-1], status=404)
        for path in (loop, "a\0b", "x" * 5000):
            assert_refused(tiny, path, status=403)
    finally:
        link.unlink()
        loop.unlink()


def test_files_inside_an_adapter_may_not_lead_out_of_the_roots(tiny: Any, tmp_path: Path) -> None:
    source = tiny.adapters["smoa-r8-k2"].path
    outside = tmp_path / "adapter_model.safetensors"
    shutil.copy(source / outside.name, outside)
    path = tiny.root / "linked-file"
    shutil.copytree(source, path)
    (path / outside.name).unlink()
    (path / outside.name).symlink_to(outside)
    assert_refused(tiny, path, status=403)


def test_a_repository_of_the_hub_is_not_fetched(tiny: Any) -> None:
    assert_refused(tiny, "someone/some-adapter", status=404)


@pytest.mark.parametrize(
    "name", ["", " ", "-x", "a b", "a@b", "smoa@0123456789abcdef", "ä", "a\nb", "a\0b", "x" * 257, "../x"]
)
def test_bad_names_are_refused(tiny: Any, name: str) -> None:
    assert_refused(tiny, tiny.adapters["smoa-r8-k2"].path, name=name)


def test_the_base_models_name_is_no_adapters(tiny: Any) -> None:
    path = tiny.adapters["smoa-r8-k2"].path
    assert_refused(tiny, path, "base-model", name="base-model")
    assert tiny.load("base-model", path, load_inplace=True).status_code == 400
    assert tiny.unload("base-model").status_code == 404


def test_a_refused_replacement_leaves_the_old_content(tiny: Any) -> None:
    bad = changed_copy(tiny.adapters["smoa-r8-k2"].path, tiny.root / "bad-again", spoil_two)
    response = tiny.load("smoa-r8-k2", bad, load_inplace=True)
    assert response.status_code == 400
    assert tiny.ask("smoa-r8-k2", PROMPT).differs(tiny.solo("smoa-r8-k2", PROMPT)) is None


@pytest.mark.parametrize("body", [{}, {"lora_name": "x"}, {"lora_path": "x"}, {"lora_name": 3, "lora_path": "x"}])
def test_incomplete_requests_are_refused(tiny: Any, body: dict[str, Any]) -> None:
    assert tiny.server.post("/v1/load_lora_adapter", body).status_code in {400, 422}


@pytest.fixture
def rewritten(tiny: Any) -> Callable[..., Path]:
    """An adapter like smoa-r8-k2 with changed modules, written as if it had always been so."""
    from smoa_serve.adapters import load_adapter, write_portable

    def rewrite(name: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Path:
        adapter = load_adapter(tiny.adapters["smoa-r8-k2"].path, None)
        return write_portable(replace(adapter, modules=change(dict(adapter.modules))), tiny.root / name)

    return rewrite


@pytest.fixture
def renamed(rewritten: Callable[..., Path]) -> Callable[..., Path]:
    """The same with modules under other names."""

    def rename(name: str, names: Mapping[str, str]) -> Path:
        return rewritten(name, lambda modules: {names.get(key, key): update for key, update in modules.items()})

    return rename
