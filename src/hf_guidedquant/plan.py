"""What will be quantized, how, and what it will weigh. A model on the meta device is enough."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from .config import GuidedQuantConfig, matches
from .errors import ConfigError, NoLinearLayersError, listed
from .experts import routers
from .formats import lut as lut_format
from .linears import is_linear, linear_shape, stored_weight
from .solvers import SOLVERS
from .solvers.outliers import memory as solver_memory

logger = logging.getLogger(__name__)

# Weights and Hessians of a batch. Fixed, not a share of what is free: products of another batch size can round
# differently, and the result should not depend on how busy a machine is. On a CPU larger batches only miss its caches.
_BATCH_BYTES_CPU, _BATCH_BYTES_GPU = 1 << 28, 1 << 29


@dataclass(frozen=True)
class LayerPlan:
    """The decision about one linear layer.

    Attributes:
        name: Module name in the model.
        out_features, in_features: Shape of the weight.
        bits, method: Settings after overrides.
        num_groups: Groups of outputs that share a Hessian; 1 unless the objective is guided.
        outliers: Weights of every row that are kept beside the codes.
    """

    name: str
    out_features: int
    in_features: int
    bits: int
    method: str
    num_groups: int
    outliers: int = 0

    @property
    def statistics(self) -> str:
        """What the solver needs from the data: ``"none"``, ``"diagonal"`` or ``"hessian"``."""
        return SOLVERS[self.method].statistics

    @property
    def statistics_shape(self) -> tuple[int, ...]:
        """Shape of the layer's fp32 statistics."""
        shape = (self.num_groups, self.in_features)
        return {"none": (0,), "diagonal": shape, "hessian": (*shape, self.in_features)}[self.statistics]

    @property
    def statistics_bytes(self) -> int:
        return 4 * math.prod(self.statistics_shape)

    def solver_bytes(self, count: int = 1) -> int:
        """Working memory for solving so many layers like this together, beside their statistics."""
        rows = -(-self.out_features // self.num_groups)
        # One layer's Hessian at a time is made fit to solve with: its copy, a factorisation, and work space.
        conditioning = 12 * self.num_groups * self.in_features**2 if self.statistics == "hessian" else 0
        solver = SOLVERS[self.method]
        return max(solver_memory(solver, count * self.num_groups, rows, self.in_features, self.outliers), conditioning)

    def batch_size(self, device: torch.device) -> int:
        """How many layers like this are solved together at most."""
        work = 4 * (6 * self.weights + 3 * self.num_groups * self.in_features**2)
        return max(1, (_BATCH_BYTES_CPU if device.type == "cpu" else _BATCH_BYTES_GPU) // work)

    @property
    def weights(self) -> int:
        return self.out_features * self.in_features

    @property
    def packed_bytes(self) -> int:
        """Codes, fp16 codebook and overlay."""
        specs = lut_format.declare(self.out_features, self.in_features, self.bits, torch.float16, self.outliers)
        return sum(spec.nbytes for spec in specs.values())


@dataclass(frozen=True)
class Plan:
    """Every weight matrix of a model: quantized as planned, or left alone for a reason.

    Attributes:
        layers: The layers to quantize, in model order.
        skipped: Name -> reason, for every weight of two or more dimensions that stays in full precision.
        dense_bytes: Size of all parameters before.
        quantized_bytes: Size of all parameters after, codebooks and overlays included.
    """

    layers: tuple[LayerPlan, ...]
    skipped: dict[str, str]
    dense_bytes: int
    quantized_bytes: int

    @property
    def needs_data(self) -> bool:
        """Whether any layer's method needs calibration data."""
        return any(layer.statistics != "none" for layer in self.layers)

    @property
    def bits_per_weight(self) -> float:
        """Mean bits per quantized weight, codebooks and overlays included."""
        return 8 * sum(layer.packed_bytes for layer in self.layers) / sum(layer.weights for layer in self.layers)


def plan_layers(model: nn.Module, config: GuidedQuantConfig) -> Plan:
    """Decide for every layer of ``model`` whether and how it is quantized.

    Linear layers (``nn.Linear``, ``Conv1D``) are found by type. The output head, the embeddings, weights that modules
    share, routers of experts, whatever of a model that also reads images or sound lies outside its text model, and
    whatever ``modules_to_not_convert`` names stay as they are. Weights that no method here can handle, such as fused
    experts that are not :func:`hf_guidedquant.experts.unfused`, are listed in ``skipped`` and logged as a warning. What
    a layer gets of a mean number of bits is only known from data; until then it is that number, rounded up.

    Raises:
        ConfigError: An override or exclusion matches no module.
        NoLinearLayersError: Nothing is left to quantize.
    """
    _check_patterns(model, config)
    layers: list[LayerPlan] = []
    skipped: dict[str, str] = {}
    unhandled: list[str] = []
    owners = _owners(model)
    dense = dict.fromkeys(routers(model), "router") | dict.fromkeys(_outside_text(model), "outside the text model")
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.dim() < 2:
                continue
            weight_name = f"{name}.{key}" if name else key
            reason = dense.get(name) or _skip_reason(name, module, parameter, owners, config, is_head=module is head)
            if reason is None:
                settings = config.for_module(name)
                settings["bits"] = math.ceil(settings["bits"])
                out_features, in_features = linear_shape(module)
                groups = _groups(out_features, config.num_groups) if config.guided else 1
                settings["outliers"] = lut_format.outliers_per_row(in_features, config.outliers)
                layers.append(LayerPlan(name, out_features, in_features, **settings, num_groups=groups))
                continue
            skipped[weight_name] = reason
            if reason.startswith("unsupported"):
                unhandled.append(f"{weight_name} {list(parameter.shape)}")
    if unhandled:
        logger.warning("Not quantized: %s. No method here can handle these weights.", listed(unhandled, 8))
    if not layers:
        raise NoLinearLayersError(
            f"{type(model).__name__} has no linear layer to quantize"
            + (f" (modules_to_not_convert={config.modules_to_not_convert})." if config.modules_to_not_convert else ".")
        )
    return Plan(tuple(layers), skipped, *_sizes(model, layers))


def with_bits(model: nn.Module, layers_plan: Plan, bits: Mapping[str, int]) -> Plan:
    """The plan with other widths of some layers, by name."""
    layers = [replace(layer, bits=bits.get(layer.name, layer.bits)) for layer in layers_plan.layers]
    return Plan(tuple(layers), layers_plan.skipped, *_sizes(model, layers))


def _check_patterns(model: nn.Module, config: GuidedQuantConfig) -> None:
    """Refuse names and patterns that mean no module: a misspelt one would go unnoticed."""
    names = [name for name, _ in model.named_modules()]
    for field, patterns in (("overrides", config.overrides), ("modules_to_not_convert", config.modules_to_not_convert)):
        for pattern in patterns or ():
            if not any(matches(name, pattern) for name in names):
                raise ConfigError(field, pattern, f"names or patterns of modules, like {names[-1]!r}")


def _skip_reason(
    name: str,
    module: nn.Module,
    parameter: nn.Parameter,
    owners: dict[int, list[str]],
    config: GuidedQuantConfig,
    is_head: bool,
) -> str | None:
    if is_head:
        return "output head"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if any(matches(name, pattern) for pattern in config.modules_to_not_convert or ()):
        return "modules_to_not_convert"
    if not is_linear(module):
        return f"unsupported: {type(module).__name__} is no plain linear layer"
    shared = [owner for owner in owners[id(parameter)] if owner != name]
    if shared:
        return f"weight is shared with {', '.join(shared)}"
    return None


def _outside_text(model: Any) -> set[str]:
    """Names of modules that calibration texts do not pass through, such as vision towers and what projects from them.

    Output heads read what the text model gives, wherever they stand.
    """
    config = getattr(model, "config", None)
    if config is None or config.get_text_config() is config:
        return set()
    text, head = model.get_decoder(), model.get_output_embeddings()
    inside = {id(module) for part in (text, head) if part is not None for module in part.modules()}
    return {name for name, module in model.named_modules() if id(module) not in inside}


def _groups(out_features: int, num_groups: int) -> int:
    """Groups of ``ceil(out / num_groups)`` outputs that it takes to cover a layer; at most ``num_groups``."""
    return math.ceil(out_features / math.ceil(out_features / num_groups))


def _owners(model: nn.Module) -> dict[int, list[str]]:
    """Parameter -> names of all modules that hold it, aliases of one module included."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    return owners


def _sizes(model: nn.Module, layers: list[LayerPlan]) -> tuple[int, int]:
    dense = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    saved = 0
    for layer in layers:
        saved += stored_weight(model.get_submodule(layer.name)).nbytes - layer.packed_bytes
    return dense, dense - saved
