"""Single weights of a Hugging Face checkpoint: which modules are linear, their bytes, their fingerprints.

Nothing is loaded but what is asked for, one tensor at a time: a 70B base costs no more memory than its largest layer.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import BaseModelError
from ..files.tensors import FLOAT_DTYPES, StoredTensor, read_headers, tensor_bytes
from .fingerprint import WeightFingerprint
from .quantized import quantized_shapes

DOWNLOAD_PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.py"]
# Only these families store a linear weight as [H_in, H_out] (transformers' Conv1D).
CONV1D_MODEL_TYPES = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer"}
CONV1D_MODULES = {"c_attn", "q_attn", "c_proj", "c_fc"}
# A checkpoint saved from the bare backbone leaves this prefix out; adapters always name it.
BACKBONE_PREFIXES = {
    "gpt2": "transformer",
    "bloom": "transformer",
    "falcon": "transformer",
    "openai-gpt": "transformer",
}
EMBEDDING = re.compile(r"(^|[._])(embed\w*|embeddings?|emb|wte|wpe|shared|relative_attention_bias)$")
OUTPUT_MODULES = {"lm_head", "embed_out", "output"}
# Parts of a module's name that say how the language model is wrapped, which differs between releases of transformers.
WRAPPERS = {"model", "language_model", *BACKBONE_PREFIXES.values()}


def is_embedding(module: str) -> bool:
    """Whether a module is an embedding, by its name."""
    return EMBEDDING.search(module) is not None


def unwrapped(module: str) -> str:
    """A module's name without the parts that say how the language model is wrapped."""
    return ".".join(part for part in module.split(".") if part not in WRAPPERS)


class BaseCheckpoint:
    """A frozen base model on disk. Make one with `BaseCheckpoint.open`.

    Attributes:
        path: local folder.
        config: parsed config.json.
        tensors: every stored tensor by its name in the files.
    """

    def __init__(self, path: Path, config: dict[str, Any], tensors: Mapping[str, StoredTensor]) -> None:
        self.path = path
        self.config = config
        self.tensors = tensors
        self._fingerprints: dict[str, WeightFingerprint] = {}

    @classmethod
    def open(cls, path: str | Path, *, revision: str | None = None) -> "BaseCheckpoint":
        """Read the headers of a checkpoint.

        Args:
            path: local folder with config.json and *.safetensors (one file or sharded), or a hub id, which is looked up
                in huggingface_hub's cache and, unless HF_HUB_OFFLINE is set, on the hub.
            revision: of a hub id.

        Raises:
            BaseModelError: no such model, no safetensors, unreadable or incomplete files.
        """
        folder = _resolve(path, revision)
        config_file = folder / "config.json"
        if not config_file.is_file():
            raise BaseModelError(f"base model {str(path)!r}: there is no config.json in {folder}")
        try:
            config = json.loads(config_file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise BaseModelError(f"base model {str(path)!r}: config.json cannot be read: {error}") from error
        return cls(folder, config, read_headers(folder))

    @property
    def is_quantized(self) -> bool:
        """True when the stored weights are not the float weights an adapter was trained on."""
        configured = self.config.get("quantization_config") or self.config.get("compression_config")
        return bool(configured or self.quantized_modules)

    @property
    def dtype(self) -> str:
        """The dtype its configuration names, in which it is served unless --dtype says otherwise; else float32."""
        text = self.config.get("text_config") or {}
        named = [config.get(key) for config in (self.config, text) for key in ("dtype", "torch_dtype")]
        return next((str(name) for name in named if name in FLOAT_DTYPES.values()), "float32")

    @property
    def tied_output(self) -> bool:
        """True when the output layer shares the embedding's weight, so that it cannot be adapted alone."""
        text = self.config.get("text_config") or {}
        stored = any(name.removesuffix(".weight") in OUTPUT_MODULES for name in self.tensors)
        return bool(self.config.get("tie_word_embeddings", text.get("tie_word_embeddings", not stored)))

    @cached_property
    def linear_modules(self) -> tuple[str, ...]:
        """Modules with a 2-D weight of their own: no norms, no embeddings, no tied output layer. In file order, those
        with a quantized weight last."""
        return (*self._linear, *self.quantized_modules)

    @cached_property
    def quantized_modules(self) -> dict[str, tuple[int, int]]:
        """Linear modules whose weight is stored quantized -> (H_out, H_in). They have no fingerprint and no order."""
        prefix = self._missing_prefix()
        shapes = quantized_shapes(self.tensors, self.config)
        return {
            f"{prefix}.{module}" if prefix else module: shape
            for module, shape in shapes.items()
            if not EMBEDDING.search(module)
        }

    @cached_property
    def _linear(self) -> dict[str, StoredTensor]:
        prefix = self._missing_prefix()
        found = {}
        for name, stored in self.tensors.items():
            module = name.removesuffix(".weight")
            if module == name or len(stored.shape) != 2 or not stored.is_float:
                continue
            if module in OUTPUT_MODULES:
                if not self.tied_output:
                    found[module] = stored
            elif not EMBEDDING.search(module):
                found[f"{prefix}.{module}" if prefix else module] = stored
        return found

    @property
    def num_layers(self) -> int:
        """Layers of the language model: a checkpoint may store more, for speculation."""
        text = self.config.get("text_config") or self.config
        return int(text.get("num_hidden_layers") or text.get("n_layer") or 2**31)

    @cached_property
    def _unwrapped(self) -> dict[str, list[str]]:
        embeddings = (n.removesuffix(".weight") for n in self.tensors if n.endswith(".weight"))
        found: dict[str, list[str]] = {}
        for module in (*self.linear_modules, *filter(is_embedding, embeddings)):
            found.setdefault(unwrapped(module), []).append(module)
        return found

    def find(self, module: str) -> str | None:
        """The name here of a linear layer or embedding that a release of transformers names `module`: the same name, or
        the only one that differs in how the language model is wrapped. None where there is no such module."""
        names = self._unwrapped.get(unwrapped(module), [])
        return module if module in names else names[0] if len(names) == 1 else None

    def stored_copy(self, name: str) -> StoredTensor | None:
        """The stored tensor that a parameter of the model is a copy of; a tied output layer's is the embedding."""
        if name in self.tensors:
            return self.tensors[name]
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] in OUTPUT_MODULES and self.tied_output:
            names = [
                n for n in self.tensors if re.search(r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in)\.weight$", n)
            ]
            return self.tensors[names[0]] if len(names) == 1 else None
        found = self.find(module)
        return None if found is None else self.tensors.get(f"{found}.weight")

    def _missing_prefix(self) -> str:
        prefix = BACKBONE_PREFIXES.get(str(self.config.get("model_type")), "model")
        bare = any(re.match(r"(layers|h|blocks?)\.\d+\.", name) for name in self.tensors)
        return prefix if bare else ""

    def stored(self, module: str) -> StoredTensor:
        """The stored tensor of a linear module.

        Raises:
            BaseModelError: the base has no such linear module, or it is quantized; the text says what is there.
        """
        if module not in self._linear:
            raise BaseModelError(f"base model {self.path.name!r}: {self._why_not_stored(module)}")
        return self._linear[module]

    def _why_not_stored(self, module: str) -> str:
        if module in self.quantized_modules:
            return f"the weight of {module!r} is quantized; give the checkpoint that it was made from"
        return self.why_not_linear(module)

    def why_not_linear(self, module: str) -> str:
        """Why `module` cannot be adapted, in one sentence without a full stop."""
        if module in OUTPUT_MODULES and self.tied_output:
            return f"the output layer {module!r} shares the embedding's weight and cannot be adapted"
        stored = self.tensors.get(f"{module}.weight")
        if stored is None:
            return f"there is no module {module!r} in the base"
        if EMBEDDING.search(module):
            return f"{module!r} is an embedding, only linear layers are supported"
        return f"{module!r} has a weight of shape {list(stored.shape)}, only linear layers are supported"

    def is_transposed(self, module: str) -> bool:
        """True when the weight is stored [H_in, H_out] (Conv1D)."""
        conv = self.config.get("model_type") in CONV1D_MODEL_TYPES
        return conv and module.rpartition(".")[2] in CONV1D_MODULES

    def shape(self, module: str) -> tuple[int, int]:
        """(H_out, H_in)."""
        if module in self.quantized_modules:
            return self.quantized_modules[module]
        rows, cols = self.stored(module).shape
        return (cols, rows) if self.is_transposed(module) else (rows, cols)

    def weight(self, module: str) -> Tensor:
        """The weight [H_out, H_in] in its stored dtype; a transposed view for Conv1D."""
        tensor = self.stored(module).read()
        return tensor.t() if self.is_transposed(module) else tensor

    def fingerprint(self, module: str) -> WeightFingerprint:
        """Identity of the stored weight; reads it once."""
        if module not in self._fingerprints:
            stored = self.stored(module)
            dtype = FLOAT_DTYPES.get(stored.dtype, stored.dtype.lower())
            digest = hashlib.sha256(tensor_bytes(stored.read())).hexdigest()
            self._fingerprints[module] = WeightFingerprint(self.shape(module), dtype, digest)
        return self._fingerprints[module]


def _resolve(path: str | Path, revision: str | None) -> Path:
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        found = snapshot_download(
            str(path),
            revision=revision,
            allow_patterns=DOWNLOAD_PATTERNS,
            local_files_only=constants.HF_HUB_OFFLINE,
        )
    except HFValidationError as error:
        raise BaseModelError(f"base model {str(path)!r}: neither a folder nor a model id of the hub") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise BaseModelError(
            f"base model {str(path)!r}: no such folder, and it is not in the local hub cache ({error})"
        ) from error
    return Path(found)
