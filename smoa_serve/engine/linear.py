"""A vLLM LoRA layer that also adds SMoA deltas: its class with a mixin in front, and one custom op on its output."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from smoa_kernels import LayerBank, SliceUpdate, StepPlan, can_be_one_pass, smoa_delta, smoa_linear
from torch import Tensor
from vllm.forward_context import get_forward_context
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.layers.column_parallel_linear import MergedColumnParallelLinearWithLoRA
from vllm.lora.layers.replicated_linear import ReplicatedLinearWithLoRA
from vllm.model_executor.layers.linear import ColumnParallelLinear, ReplicatedLinear
from vllm.utils.torch_utils import direct_register_custom_op

from smoa_serve.adapters.model import ModuleUpdate
from smoa_serve.engine.host.compiling import embedding_delta
from smoa_serve.engine.weights import ServedWeight


@dataclass(frozen=True, eq=False)
class SmoaLayerWeights:
    """What an adapter brings to one layer, in the place where vLLM keeps LoRA weights.

    Attributes:
        lora_a: per packed slice the update in full (unsharded) coordinates, None where the adapter leaves it alone.
        lora_b: always None; vLLM passes both to `set_lora`.
    """

    lora_a: tuple[ModuleUpdate | None, ...]
    lora_b: None = None


def layer_key(module_name: str) -> str:
    """The name under which a layer stands in vLLM's forward context."""
    return f"{module_name}.smoa"


class SmoaLinearMixin:
    """In front of a `BaseLinearLayerWithLoRA` subclass. `attach` makes an instance one.

    Attributes:
        smoa_bank: the slots of this layer.
        smoa_plan: the manager's step plan.
        smoa_weight: the base weight as served.
        smoa_key: name in the forward context.
        smoa_one_op: the whole layer is one op, LoRA's part included: on a CPU. vLLM's CPU kernels for LoRA branch in
            Python on the batch, which a compiled graph would freeze, and base product and deltas may be one pass.
    """

    smoa_bank: LayerBank
    smoa_plan: StepPlan
    smoa_weight: ServedWeight
    smoa_key: str
    smoa_one_op: bool
    punica_wrapper: Any
    base_layer: Any
    lora_a_stacked: tuple[Tensor, ...]
    lora_b_stacked: tuple[Tensor, ...]
    output_slices: tuple[int, ...]

    def apply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The layer's output with LoRA and SMoA deltas: [..., H_out]."""
        output: Tensor
        if self.smoa_one_op:
            output = torch.ops.smoa_serve.linear(x, bias, sum(self.output_slices), self.smoa_key)
            return output
        output = super().apply(x, bias)  # type: ignore[misc]
        # The whole output where it is two-dimensional: a mutated view miscompiles under inductor.
        y = output if output.ndim == 2 else output.view(-1, output.shape[-1])
        torch.ops.smoa_serve.delta(y, x if x.ndim == 2 else x.reshape(-1, x.shape[-1]), self.smoa_key)
        return output

    def add_deltas(self, y: Tensor, x: Tensor) -> None:
        """What the op `delta` does: y [T, H_out] += the SMoA deltas of x [T, H_in]."""
        smoa_delta(y, x, self.smoa_bank, self.smoa_plan)

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """What the op `linear` does: the layer's output [..., H_out] of x [..., H_in], all deltas included."""
        flat = x.reshape(-1, x.shape[-1])
        plan, no_lora = self.smoa_plan, self.punica_wrapper.no_lora
        if plan.active and no_lora and len(flat) == plan.num_tokens and can_be_one_pass(self.smoa_bank, plan):
            y = smoa_linear(flat, self.smoa_bank, plan, bias)
        else:
            y = self.base_layer.quant_method.apply(self.base_layer, flat, bias)
            if not no_lora:
                slots = self.lora_a_stacked, self.lora_b_stacked
                self.punica_wrapper.add_lora_linear(y, flat, *slots, 1.0, self.output_slices)
            smoa_delta(y, flat, self.smoa_bank, plan)
        return y.view(*x.shape[:-1], y.shape[-1])

    def set_lora(self, index: int, lora_a: Any, lora_b: Any) -> None:
        """Put an adapter into a slot: SMoA into the bank, anything else the way vLLM does."""
        if lora_b is not None:
            self.smoa_bank.clear(index)
            super().set_lora(index, lora_a, lora_b)  # type: ignore[misc]
            return
        try:
            self.smoa_bank.set(index, [_shard(self, i, update) for i, update in enumerate(lora_a)])
        finally:
            self.smoa_weight.close()

    def reset_lora(self, index: int) -> None:
        """Empty a slot."""
        self.smoa_bank.clear(index)
        super().reset_lora(index)  # type: ignore[misc]


def _shard(layer: Any, index: int, update: ModuleUpdate | None) -> SliceUpdate | None:
    """This rank's part of an update, cut by the layer's own LoRA slicing; block ids are cut like factors of rank 1."""
    if update is None:
        return None
    a, b = update.a, update.b
    rows, cols = update.row_block[:, None], update.col_block[None, :]
    if layer.tp_size > 1:
        packed = layer.n_slices > 1
        a, cols = (_cut(layer.slice_lora_a, t, index, layer.n_slices, packed) for t in (a, cols))
        b, rows = (_cut(layer.slice_lora_b, t, index, layer.n_slices, packed) for t in (b, rows))
    return SliceUpdate(
        a=a, b=b, row_block=rows[:, 0].contiguous(), col_block=cols[0].contiguous(), scaling=update.scaling
    )


def _cut(slice_fn: Any, tensor: Tensor, index: int, n_slices: int, packed: bool) -> Tensor:
    if not packed:
        cut: Tensor = slice_fn(tensor)
        return cut
    wanted: list[Tensor | None] = [None] * n_slices
    wanted[index] = tensor
    part: Tensor = slice_fn(wanted)[index]
    return part


@cache
def _smoa_class(cls: type) -> type:
    return type(f"Smoa{cls.__name__}", (SmoaLinearMixin, cls), {})


def slice_sizes(layer: BaseLinearLayerWithLoRA) -> tuple[int, ...]:
    """Rows of each packed slice on this rank."""
    return tuple(int(stacked.shape[2]) for stacked in layer.lora_b_stacked)


def dtype_refusal(layer: BaseLinearLayerWithLoRA, dtype: torch.dtype) -> str | None:
    """Why no delta can be added to the layer's output: routers of experts often run in float32. None: it can.

    Args:
        layer: vLLM's wrapper.
        dtype: of the model.
    """
    base = layer.base_layer
    output = getattr(base, "out_dtype", None) or getattr(base, "params_dtype", None) or dtype
    if output == dtype:
        return None
    return f"its output is {_name(output)} where the model runs in {_name(dtype)}; SMoA and HiRA cannot be added to it"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def attach(
    layer: BaseLinearLayerWithLoRA,
    module_name: str,
    plan: StepPlan,
    num_slots: int,
    dtype: torch.dtype,
    captured: bool,
    whole: bool,
) -> None:
    """Turn a wrapped layer into one that adds SMoA deltas. The slots' memory is vLLM's own LoRA buffers.

    A slot holds either LoRA factors or SMoA factors; the two per-step maps never send a token to both.

    Args:
        layer: vLLM's wrapper; changed in place.
        module_name: its name in the model.
        plan: of the manager.
        num_slots: slots of the server.
        dtype: of the model.
        captured: CUDA graphs will be captured.
        whole: on a CPU, keep the weight a second time, for one pass over it.
    """
    sizes, columns = slice_sizes(layer), int(layer.lora_a_stacked[0].shape[-1])
    cls: type = type(layer)
    layer.__class__ = _smoa_class(cls)
    layer.smoa_weight = ServedWeight(layer.base_layer, sizes, columns, dtype)
    layer.smoa_plan, layer.smoa_key = plan, layer_key(module_name)
    layer.smoa_one_op = plan.device.type == "cpu" and not _has_own_forward(layer)
    # Elsewhere the blocks are dequantized, and finding out would cost the start some time.
    fp8 = plan.device.type == "cuda" and layer.smoa_weight.is_kernel_fp8
    layer.smoa_bank = LayerBank(
        a=[_slots(stacked, num_slots) for stacked in layer.lora_a_stacked],
        b=[_slots(stacked, num_slots).view(num_slots, -1, stacked.shape[2]) for stacked in layer.lora_b_stacked],
        weight_block=layer.smoa_weight.fp8_block if fp8 else layer.smoa_weight.block,
        row_scale=layer.smoa_weight.row_scale if fp8 else None,
        whole=whole and layer.smoa_one_op and layer.smoa_weight.merge_refusal() is None,
        retain_partitions=_RETAINED if plan.device.type == "cpu" else 0,
    )
    # What a step needs exists before vLLM measures what is left for the KV cache, and before any capture.
    layer.smoa_bank.backend.attach_plan(plan, layer.smoa_bank, captured)


def can_be_opaque(layer: Any) -> bool:
    """Whether `attach` makes everything in the layer that depends on the batch run inside the op."""
    return isinstance(layer, BaseLinearLayerWithLoRA) and not _has_own_forward(layer)


def _has_own_forward(layer: Any) -> bool:
    """Whether vLLM calls the base layer's own forward instead of its matrix product."""
    wrapped = {MergedColumnParallelLinearWithLoRA: ColumnParallelLinear, ReplicatedLinearWithLoRA: ReplicatedLinear}
    return any(
        isinstance(layer, wrapper) and getattr(type(layer.base_layer), "forward", None) is not plain.forward
        for wrapper, plain in wrapped.items()
    )


# Unused partitions kept per slice, where reading a weight again is costly: a CPU's packed weight has to be recovered.
_RETAINED = 2


def _slots(stacked: Tensor, num_slots: int) -> Tensor:
    return stacked[:num_slots, 0]


def add_empty_slot(layer: Any) -> None:
    """Give a layer's LoRA B one more slot that stays zero.

    vLLM's CPU kernels index the slots with -1 for tokens without an adapter, which is the LAST slot: once it is in use,
    base tokens would get that adapter.
    """
    stacked: Sequence[Tensor] | Tensor = layer.lora_b_stacked
    if isinstance(stacked, Tensor):
        layer.lora_b_stacked = _with_empty_slot(stacked)
    else:
        layer.lora_b_stacked = tuple(_with_empty_slot(tensor) for tensor in stacked)


def _with_empty_slot(tensor: Tensor) -> Tensor:
    return torch.zeros((tensor.shape[0] + 1, *tensor.shape[1:]), dtype=tensor.dtype, device=tensor.device)


def _delta(y: Tensor, x: Tensor, layer_name: str) -> None:
    get_forward_context().no_compile_layers[layer_name].add_deltas(y, x)


def _linear(x: Tensor, bias: Tensor | None, h_out: int, layer_name: str) -> Tensor:
    layer: SmoaLinearMixin = get_forward_context().no_compile_layers[layer_name]
    return layer.linear(x, bias)


def _linear_fake(x: Tensor, bias: Tensor | None, h_out: int, layer_name: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], h_out))


def _delta_fake(y: Tensor, x: Tensor, layer_name: str) -> None:
    return None


def register_op() -> None:
    """Register the ops under `torch.ops.smoa_serve`, once per process."""
    library = torch.library.Library("smoa_serve", "FRAGMENT")  # type: ignore[no-untyped-call]
    direct_register_custom_op(
        op_name="delta", op_func=_delta, mutates_args=["y"], fake_impl=_delta_fake, target_lib=library
    )
    direct_register_custom_op(
        op_name="linear", op_func=_linear, mutates_args=[], fake_impl=_linear_fake, target_lib=library
    )
    direct_register_custom_op(
        op_name="embedding_delta",
        op_func=embedding_delta,
        mutates_args=["y"],
        fake_impl=_delta_fake,
        target_lib=library,
    )
    _LIBRARIES.append(library)


# A torch Library unregisters its operators when it is collected.
_LIBRARIES: list[torch.library.Library] = []
register_op()
