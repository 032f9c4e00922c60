import re
from pathlib import Path
from typing import Any

import torch
from smoa_kernels.testing import assert_close, dense_delta

README = Path(__file__).parents[2] / "kernels" / "README.md"


def test_the_example_runs_and_does_what_it_says():
    example, _ = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)  # the second one: test_backend
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    exec(example, names)
    x, weight = names["x"], names["weight"]
    expected = x @ weight.T
    expected[[0, 2]] += x[[0, 2]] @ dense_delta(names["update"], weight).T
    assert_close(names["y"], expected)
