"""Mixtures of experts: linear layers per expert in place of the fused 3-D weights that Transformers keeps.

Transformers marks its fused experts by what they have in common: a weight ``[experts, out, in]`` for the way up and one
for the way down, perhaps biases, perhaps transposed, and a method that applies the gate in between. :class:`Experts`
holds the same weights as ordinary linear layers, ``experts.0.gate_up_proj`` and so on, so that each has Hessians,
codes and a name of its own like any other layer.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.conv import _ConvNd

from .config import GuidedQuantConfig, matches
from .linears import swap_module

DOWN = "down_proj"


class Experts(nn.Module):
    """Experts as linear layers; otherwise what the fused ones are, with the same arguments and results.

    Args:
        fused: Experts that Transformers keeps in 3-D weights (see :func:`fused_experts`). The linear layers' weights
            are views of theirs, until :meth:`take_over`.
    """

    def __init__(self, fused: Any) -> None:
        super().__init__()
        # In a tuple, because its weights are not to be this module's. It knows its activation and its gate.
        self._fused = (fused,)
        self.up = _up(fused)
        self.num_experts = len(getattr(fused, DOWN))
        for name, child in fused.named_children():
            self.add_module(name, child)
        for number in range(self.num_experts):
            expert = nn.Module()
            for name in (self.up, DOWN):
                expert.add_module(name, _linear(fused, name, number))
            self.add_module(str(number), expert)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The weighted sum of what each token's experts give.

        Args:
            hidden_states: ``[T, hidden]``, any float dtype.
            top_k_index: The experts of every token, int64 ``[T, k]``. ``num_experts`` and above stand for none.
            top_k_weights: Their weights, ``[T, k]``.

        Returns:
            ``[T, hidden]`` in the dtype of ``hidden_states``.
        """
        tokens, k = top_k_index.shape
        order = top_k_index.flatten().argsort(stable=True)
        outputs = self._apply_experts(hidden_states[order // k], top_k_index)[order.argsort()]
        # Summed in the order of the choices, not with atomic additions, whose order is any.
        weighted = outputs * top_k_weights.reshape(-1, 1)
        return weighted.view(tokens, k, -1).sum(dim=1).to(hidden_states.dtype)

    @torch.compiler.disable
    def _apply_experts(self, routed: Tensor, top_k_index: Tensor) -> Tensor:
        """What the experts make of tokens ``[T * k, hidden]`` in the order of their experts, each of its own."""
        # Without data nobody knows the choices; all experts run then, so that what they take is counted.
        unknown = routed.is_meta or isinstance(routed, FakeTensor)
        counts = self._even_counts(len(routed)) if unknown else self._counts(top_k_index)
        *parts, rest = routed.split(counts)
        outputs = [self._apply_expert(k, part) for k, part in enumerate(parts) if unknown or len(part)]
        return torch.cat([*outputs, torch.zeros_like(rest)])

    def _counts(self, top_k_index: Tensor) -> list[int]:
        """Tokens of every expert, and of none."""
        chosen = top_k_index.flatten().clamp(max=self.num_experts)
        return torch.bincount(chosen, minlength=self.num_experts + 1).tolist()

    def _even_counts(self, total: int) -> list[int]:
        each, more = divmod(total, self.num_experts)
        return [each + (k < more) for k in range(self.num_experts)] + [0]

    def _apply_expert(self, number: int, x: Tensor) -> Tensor:
        fused, expert = self._fused[0], getattr(self, str(number))
        inner = getattr(expert, self.up)(x)
        inner = fused._apply_gate(inner) if fused.has_gate else fused.act_fn(inner)
        y = getattr(expert, DOWN)(inner)
        return fused.post_expert_norm(y) if getattr(fused, "has_post_expert_norm", False) else y

    def take_over(self) -> None:
        """Give dense tensors that are views of fused ones memory of their own, and let the fused ones go."""
        for parameter in self.parameters():
            if parameter.untyped_storage().nbytes() != parameter.nbytes:
                parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
        for name, parameter in self._fused[0].named_parameters(recurse=False):
            setattr(self._fused[0], name, nn.Parameter(parameter.to("meta"), requires_grad=False))

    def fuse(self) -> nn.Module:
        """The fused experts again, with this module's weights, which must be dense."""
        fused = self._fused[0]
        for name in (self.up, DOWN):
            linears = [getattr(getattr(self, str(number)), name) for number in range(self.num_experts)]
            for kind, parameters in (("weight", [x.weight for x in linears]), ("bias", [x.bias for x in linears])):
                if parameters[0] is not None:
                    whole = torch.stack([parameter.detach() for parameter in parameters])
                    whole = whole.mT.contiguous() if kind == "weight" and fused.is_transposed else whole
                    setattr(fused, _fused_name(name, kind), nn.Parameter(whole, parameters[0].requires_grad))
        return fused


def fused_experts(model: nn.Module) -> dict[str, nn.Module]:
    """The experts of a model that are fused and that :class:`Experts` can stand in for, by name."""
    modules = list(model.named_modules(remove_duplicate=False))
    owners = Counter(id(parameter) for _, module in modules for parameter in module.parameters(recurse=False))
    return {
        name: module
        for name, module in modules
        if _is_fused(module) and all(owners[id(parameter)] == 1 for parameter in module.parameters(recurse=False))
    }


def unfuse(model: nn.Module) -> dict[str, nn.Module]:
    """Put :class:`Experts` where fused experts are; returns those, by name."""
    found = fused_experts(model)
    for name, fused in found.items():
        swap_module(model, name, Experts(fused))
    return found


@contextmanager
def unfused(model: nn.Module, config: GuidedQuantConfig, *, only_inside: bool = False) -> Iterator[None]:
    """A model whose experts are linear layers, if any of them is to be quantized; then all are.

    Args:
        model: Any; without fused experts nothing happens.
        config: ``modules_to_not_convert`` may exclude all experts.
        only_inside: Whether the fused experts come back at the end. After an exception they always do.
    """
    wanted = any(_is_wanted(name, fused, config) for name, fused in fused_experts(model).items())
    found = unfuse(model) if wanted else {}
    finished = False
    try:
        yield
        finished = True
    finally:
        for name, fused in found.items():
            if only_inside or not finished:
                swap_module(model, name, fused)
            else:
                model.get_submodule(name).take_over()  # type: ignore[operator]


def fuse_experts(model: nn.Module) -> None:
    """Put fused experts back where :class:`Experts` of dense layers are."""
    for name, experts in unfused_experts(model).items():
        swap_module(model, name, experts.fuse())


def unfused_experts(model: nn.Module) -> dict[str, Experts]:
    """The experts of a model that are linear layers in place of fused ones, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Experts)}


def routers(model: nn.Module) -> set[str]:
    """Names of modules that choose and weigh experts: they stand beside the experts, and their only matrix has a row
    for each of them, or one row in all.
    """
    found = set()
    for name, module in model.named_modules():
        count = _count(name, module)
        if count is None:
            continue
        parent, _, own = name.rpartition(".")
        for child, sibling in model.get_submodule(parent).named_children():
            matrices = [key for key, parameter in sibling.named_parameters() if parameter.dim() == 2]
            if child != own and len(matrices) == 1 and len(sibling.get_parameter(matrices[0])) in (1, count):
                found.add(".".join(filter(None, (parent, child, matrices[0].rpartition(".")[0]))))
    return found


def _count(name: str, module: nn.Module) -> int | None:
    """How many experts a module holds, if it may be one that holds experts."""
    if isinstance(module, Experts):
        return module.num_experts
    if isinstance(module, nn.ModuleList):
        return len(module) if name.rpartition(".")[2] == "experts" else None
    # Fused experts of other kinds too.
    stacks = [len(parameter) for parameter in module.parameters(recurse=False) if parameter.dim() == 3]
    return stacks[0] if stacks and stacks[0] > 1 and not isinstance(module, _ConvNd) else None


def _is_wanted(name: str, fused: nn.Module, config: GuidedQuantConfig) -> bool:
    """Whether any of the linear layers to be is to be quantized."""
    layers = (f"{name}.{k}.{part}" for k in range(len(getattr(fused, DOWN))) for part in (_up(fused), DOWN))
    return any(not _excluded(layer, config.modules_to_not_convert or ()) for layer in layers)


def _excluded(name: str, patterns: Iterable[str]) -> bool:
    return any(matches(name, pattern) for pattern in patterns)


def _is_fused(module: Any) -> bool:
    """Whether a module keeps the contract of Transformers' fused experts, and holds no other weights."""
    marks = ("has_gate", "has_bias", "is_transposed")
    if not all(isinstance(getattr(module, mark, None), bool) for mark in marks) or not hasattr(module, "_apply_gate"):
        return False
    found = dict(module.named_parameters(recurse=False))
    kinds = ("weight", "bias") if module.has_bias else ("weight",)
    if found.keys() != {_fused_name(name, kind) for name in (_up(module), DOWN) for kind in kinds}:
        return False
    up, down = found[_up(module)], found[DOWN]
    if up.dim() != 3 or down.dim() != 3 or len(up) != len(down) or getattr(module, "_is_expert_parallel", False):
        return False
    # What goes in comes out.
    return up.shape[1 if module.is_transposed else 2] == down.shape[2 if module.is_transposed else 1]


def _up(fused: Any) -> str:
    return "gate_up_proj" if fused.has_gate else "up_proj"


def _fused_name(name: str, kind: str) -> str:
    return name if kind == "weight" else f"{name}_bias"


def _linear(fused: Any, name: str, number: int) -> nn.Linear:
    """An expert's part of fused weights as a linear layer, without a copy."""
    weight = _part(getattr(fused, name), number, fused.is_transposed)
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=fused.has_bias, device="meta")
    linear.weight = weight
    if fused.has_bias:
        linear.bias = _part(getattr(fused, _fused_name(name, "bias")), number)
    return linear.train(fused.training)


def _part(whole: nn.Parameter, number: int, transposed: bool = False) -> nn.Parameter:
    part = whole.detach()[number]
    parameter = nn.Parameter(part.mT if transposed else part, requires_grad=whole.requires_grad)
    # Transformers' mark of a weight that was found in a file.
    vars(parameter).update(vars(whole))
    return parameter
