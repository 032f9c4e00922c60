"""An adapter against its base: all reasons at once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from smoa_serve.adapters.fits import check_binding
from smoa_serve.adapters.model import Adapter, AdapterKind, ModuleUpdate, OrderStatus
from smoa_serve.base.checkpoint import BaseCheckpoint
from smoa_serve.base.fingerprint import WeightFingerprint
from smoa_serve.errors import AdapterError

MakeBase = Callable[..., Path]
NAMES = [f"model.layers.{i}.mlp.up_proj" for i in range(4)]


def _update(rows: int, cols: int, base: WeightFingerprint | None) -> ModuleUpdate:
    blocks = (torch.zeros(rows, dtype=torch.int16), torch.zeros(cols, dtype=torch.int16))
    return ModuleUpdate(torch.ones(1, cols), torch.ones(rows, 1), *blocks, (1,), 1.0, base)


def _adapter(modules: dict[str, ModuleUpdate]) -> Adapter:
    return Adapter(AdapterKind.SMOA, modules, rank=1, num_blocks=1, alpha=1.0, order=OrderStatus.RECORDED)


@pytest.fixture
def base(make_base: MakeBase) -> BaseCheckpoint:
    tensors: dict[str, Any] = {f"{name}.weight": torch.randn(6, 4) for name in NAMES}
    return BaseCheckpoint.open(make_base(tensors | {"model.norm.weight": torch.ones(4)}))


def test_an_adapter_of_this_base_fits(base: BaseCheckpoint) -> None:
    check_binding(_adapter({name: _update(6, 4, base.fingerprint(name)) for name in NAMES}), base)
    check_binding(_adapter({NAMES[0]: _update(6, 4, None)}), base)


def test_every_reason_is_given_in_one_error(base: BaseCheckpoint) -> None:
    right = base.fingerprint(NAMES[0])
    modules = {
        "model.layers.9.mlp.up_proj": _update(6, 4, None),
        "model.norm": _update(4, 4, None),
        NAMES[0]: _update(5, 4, None),
        NAMES[1]: _update(6, 4, WeightFingerprint((6, 4), "float32", "0" * 64)),
        NAMES[2]: _update(6, 4, WeightFingerprint((6, 4), "bfloat16", right.sha256)),
        NAMES[3]: _update(6, 4, base.fingerprint(NAMES[3])),
    }
    with pytest.raises(AdapterError) as caught:
        check_binding(_adapter(modules), base, source="mine")
    reasons = caught.value.reasons
    assert len(reasons) == 5
    assert reasons[0] == "there is no module 'model.layers.9.mlp.up_proj' in the base"
    assert "weight of shape [4], only linear layers are supported" in reasons[1]
    assert reasons[2] == f"{NAMES[0]}: the factors are for a layer of 5 × 4, the base has 6 × 4"
    assert f"{NAMES[1]}: trained on another base: its weight has the digest 000000000000…" in reasons[3]
    assert reasons[4] == f"{NAMES[2]}: trained on bfloat16 weights, but this base stores float32: another base"
    assert str(caught.value).startswith("adapter 'mine' was refused:\n  - ")


def test_an_adapter_that_binds_nothing_is_refused(base: BaseCheckpoint) -> None:
    with pytest.raises(AdapterError, match="nothing would be bound"):
        check_binding(_adapter({}), base)


def test_a_quantized_layer_is_checked_for_its_shape_and_the_log_says_that_it_is_no_more(
    make_base: MakeBase, caplog: pytest.LogCaptureFixture
) -> None:
    tensors: dict[str, Any] = {f"{NAMES[0]}.weight": torch.zeros(6, 4, dtype=torch.int8)}
    base = BaseCheckpoint.open(make_base(tensors | {f"{NAMES[1]}.weight": torch.zeros(6, 4)}))
    foreign = WeightFingerprint((6, 4), "bfloat16", "0" * 64)
    right = _update(6, 4, base.fingerprint(NAMES[1]))
    check_binding(_adapter({NAMES[0]: _update(6, 4, foreign), NAMES[1]: right}), base, source="mine")
    assert "Adapter mine: 1 of its 2 layers are quantized in this base" in caplog.text
    with pytest.raises(AdapterError) as caught:
        check_binding(_adapter({NAMES[0]: _update(5, 4, foreign), NAMES[1]: _update(6, 4, foreign)}), base)
    assert [reason.split(":")[0] for reason in caught.value.reasons] == NAMES[:2]
    assert "the factors are for a layer of 5 × 4, the base has 6 × 4" in caught.value.reasons[0]
    assert "trained on bfloat16 weights" in caught.value.reasons[1]
