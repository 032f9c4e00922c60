"""Which modules a configuration names."""

import pytest

from smoa_serve.adapters.patterns import PatternError
from smoa_serve.adapters.targets import layer_index, select_modules, unmatched

MODULES = [
    *(f"model.layers.{i}.{m}" for i in range(3) for m in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")),
    "transformer.h.1.attn.c_attn",
    "lm_head",
]


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        (["q_proj"], 3),
        (["proj"], 0),
        (["self_attn.v_proj", "lm_head"], 4),
        (["model.layers.1.mlp.up_proj"], 1),
        (r".*\.(q|v)_proj", 6),
        (r"q_proj", 0),
        (r".*layers\.[02]\..*up_proj", 2),
    ],
    ids=[
        "suffix",
        "no part of a word",
        "longer suffix",
        "full name",
        "regex",
        "regex must match in full",
        "regex layer",
    ],
)
def test_targets_are_suffixes_after_a_dot_or_one_full_regex(targets: list[str] | str, count: int) -> None:
    assert len(select_modules(MODULES, targets)) == count


@pytest.mark.parametrize(
    ("layers", "pattern", "expected"),
    [(1, None, {1}), ([0, 2], None, {0, 2}), ([1], "layers", {1}), ([1], "h", set()), ([9], None, set())],
)
def test_layers_to_transform_keeps_only_these_layers(
    layers: int | list[int], pattern: str | None, expected: set[int]
) -> None:
    found = select_modules(MODULES, ["q_proj"], layers_to_transform=layers, layers_pattern=pattern)
    assert {layer_index(name) for name in found} == expected


def test_layers_to_transform_drops_modules_outside_of_layers() -> None:
    assert select_modules(MODULES, ["lm_head"], layers_to_transform=[0]) == []


def test_layers_to_transform_is_ignored_for_a_regex_as_published() -> None:
    assert len(select_modules(MODULES, r".*q_proj", layers_to_transform=[0])) == 3


def test_excluded_modules_are_taken_away() -> None:
    assert len(select_modules(MODULES, ["q_proj", "v_proj"], exclude_modules=["v_proj"])) == 3


def test_layer_index_is_the_number_after_the_list_of_layers() -> None:
    assert layer_index("model.layers.12.mlp.experts.3.up_proj") == 12
    assert layer_index("transformer.h.7.attn.c_attn") == 7
    assert layer_index("encoder.stages.4.x") is None


def test_targets_that_name_nothing_are_told() -> None:
    assert unmatched(MODULES, ["q_proj", "k_proj"]) == ["k_proj"]
    assert unmatched(MODULES, r".*k_proj") == [r".*k_proj"]
    with pytest.raises(PatternError, match=r"'\(' is no regular expression: missing \)"):
        select_modules(MODULES, "(")
