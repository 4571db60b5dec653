"""What will be quantized, how, and what it will weigh. A model on the meta device is enough."""

import inspect
import logging
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from .config import GuidedQuantConfig, matches
from .errors import ConfigError, NoLinearLayersError, listed
from .experts import routers
from .formats import lut as lut_format
from .linears import is_linear, linear_shape, scaled_rows, stored_weight, vocabulary_layers
from .solvers import SOLVERS
from .solvers.gptq import memory as sweep_memory
from .solvers.kronecker import memory as refining_memory
from .solvers.outliers import memory as solver_memory

logger = logging.getLogger(__name__)

# Weights and Hessians of a batch. Fixed, not a share of what is free: products of another batch size can round
# differently, and the result should not depend on how busy a machine is. On a CPU larger batches only miss its caches.
_BATCH_BYTES_CPU, _BATCH_BYTES_GPU = 1 << 28, 1 << 29
# Outputs of a group that are solved at once: more than most layers have, but a vocabulary has more.
_MOST_ROWS = 1 << 15
# What a GPU's Cholesky factorisation takes beyond a CPU's, in matrices like the one that is factorised: by the peaks of
# three runs on an H100 with torch 2.11, of Llama-3.1-8B and 70B shapes.
_FACTORING = 2.15


@dataclass(frozen=True)
class LayerPlan:
    """The decision about one linear layer, or about the embeddings, whose outputs are the vocabulary.

    Attributes:
        name: Module name in the model.
        out_features, in_features: Shape of the weight.
        bits, method: Settings after overrides.
        num_groups: Groups of outputs that share a Hessian; 1 unless the objective is guided.
        outliers: Weights of every row that are kept beside the codes.
        output_curvature: Whether all outputs are bettered together after the method.
    """

    name: str
    out_features: int
    in_features: int
    bits: int
    method: str
    num_groups: int
    outliers: int = 0
    output_curvature: bool = False

    @property
    def statistics(self) -> str:
        """What the solver needs from the data: ``"none"``, ``"diagonal"`` or ``"hessian"``."""
        return SOLVERS[self.method].statistics

    @property
    def statistics_shape(self) -> tuple[int, ...]:
        """Shape of the layer's fp32 Hessians, or of their diagonals."""
        shape = (self.num_groups, self.in_features)
        return {"none": (0,), "diagonal": shape, "hessian": (*shape, self.in_features)}[self.statistics]

    @property
    def curvature_shape(self) -> tuple[int, int] | None:
        """Shape of the fp32 curvature of the layer's outputs; None if it is not needed."""
        return (self.out_features, self.out_features) if self.output_curvature else None

    @property
    def statistics_bytes(self) -> int:
        return 4 * (math.prod(self.statistics_shape) + math.prod(self.curvature_shape or (0,)))

    def solver_bytes(self, device: torch.device, count: int = 1) -> int:
        """Working memory for solving so many layers like this together there, beside their statistics."""
        rows = self.rows_at_once
        # Of the rows that wait for their turn, weights and codes.
        waiting = 5 * count * max(0, self.out_features - rows * self.num_groups) * self.in_features
        # One layer's Hessian at a time is made fit to solve with: its copy, a factorisation, and work space.
        conditioning = 12 * self.num_groups * self.in_features**2 if self.statistics == "hessian" else 0
        solver = SOLVERS[self.method]
        solving = solver_memory(solver, count * self.num_groups, rows, self.in_features, self.outliers) + waiting
        if self.statistics == "hessian" and device.type == "cuda":
            factoring = int(_FACTORING * 4 * self.in_features**2)
            sweep = sweep_memory(count * self.num_groups, rows, self.in_features) + waiting
            solving, conditioning = max(solving, sweep + factoring), conditioning + factoring
        if not self.output_curvature:
            return max(solving, conditioning)
        # The Hessian of all outputs is there besides, and one layer's curvature at a time is made fit. Both are there
        # once more while those of several layers are put together.
        besides = 4 * count * self.in_features**2
        refining = refining_memory(count, self.out_features, self.in_features)
        return max(solving + besides, refining, conditioning + 4 * self.out_features**2)

    @property
    def rows_at_once(self) -> int:
        """Outputs of a group that are solved together: all, if one depends on another."""
        rows = -(-self.out_features // self.num_groups)
        return rows if self.output_curvature else min(rows, _MOST_ROWS)

    def batch_size(self, device: torch.device) -> int:
        """How many layers like this are solved together at most."""
        work = 4 * (6 * self.weights + 3 * self.num_groups * self.in_features**2)
        work += 3 * 4 * math.prod(self.curvature_shape or (0,))
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

    Linear layers (``nn.Linear``, ``Conv1D``) are found by type. The output head and the input embeddings are left alone
    without ``embedding_bits``; if they are tied, the plan names the head for both. Other embeddings, weights that other
    modules share, routers of experts, whatever of a model that also reads images or sound lies outside its text model,
    and whatever ``modules_to_not_convert`` names stay as they are. Weights that no method here can handle, such as
    fused experts that are not :func:`hf_guidedquant.experts.unfused`, are listed in ``skipped`` and logged. What a
    layer gets of a mean number of bits is only known from data; until then it is that number, rounded up.

    Raises:
        ConfigError: An override matches no layer that is quantized, an exclusion no module, or ``embedding_bits`` saves
            nothing.
        NoLinearLayersError: Nothing is left to quantize.
    """
    _check_exclusions(model, config)
    layers: list[LayerPlan] = []
    skipped: dict[str, str] = {}
    unhandled: list[str] = []
    owners = _owners(model)
    dense = dict.fromkeys(routers(model), "router") | dict.fromkeys(_outside_text(model), "outside the text model")
    vocabulary = vocabulary_layers(model)
    why_not = "unsupported: the model casts activations to its dtype, which codes do not have"
    casts = {vocabulary[1]: why_not} if _reads_dtype(model, vocabulary[1]) else {}
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.dim() < 2:
                continue
            weight_name = f"{name}.{key}" if name else key
            tied = name in vocabulary and set(owners[id(parameter)]) >= set(vocabulary)
            reasons = [
                dense.get(one)
                or _skip_reason(one, model.get_submodule(one), parameter, owners, config, vocabulary)
                or casts.get(one)
                for one in dict.fromkeys((name, *(vocabulary if tied else ())))
            ]
            reason = next((reason for reason in reasons if reason is not None), None)
            if reason is None:
                if not (tied and name == vocabulary[0]):
                    layers.append(_layer(name, module, config, name in vocabulary))
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
    _check_overrides(config, layers, skipped, vocabulary)
    return Plan(tuple(layers), skipped, *_sizes(model, layers))


def called_only(model: nn.Module, layers_plan: Plan, called: Collection[str]) -> Plan:
    """The plan without linear layers that the model never calls. Mamba, for one, multiplies with a weight by itself.

    Args:
        model: The model of the plan.
        layers_plan: The plan.
        called: Names of the linear layers that are called when it runs; none if that is not known.

    Raises:
        NoLinearLayersError: Nothing is left to quantize.
    """
    names = [layer.name for layer in layers_plan.layers if is_linear(model.get_submodule(layer.name))]
    idle = [name for name in names if called and name not in called]
    if not idle:
        return layers_plan
    logger.warning(
        "Not quantized: %s. %s never calls these layers, so their weights must stay weights.",
        listed(idle, 8),
        type(model).__name__,
    )
    layers = [layer for layer in layers_plan.layers if layer.name not in idle]
    if not layers:
        raise NoLinearLayersError(f"{type(model).__name__} calls no linear layer that could be quantized.")
    skipped = layers_plan.skipped | {f"{name}.weight": "unsupported: the layer is never called" for name in idle}
    return Plan(tuple(layers), skipped, *_sizes(model, layers))


def quantized_embeddings(model: nn.Module, layers: Iterable[LayerPlan]) -> tuple[str, str] | None:
    """The name of the embeddings that are to be quantized, and of the layer whose codes they get.

    None if they stay as they are.
    """
    name, head = vocabulary_layers(model)
    if name is None:
        return None
    planned = {layer.name for layer in layers}
    if head in planned and model.get_submodule(str(head)).weight is model.get_submodule(name).weight:
        return name, str(head)
    return (name, name) if name in planned else None


def with_bits(model: nn.Module, layers_plan: Plan, bits: Mapping[str, int]) -> Plan:
    """The plan with other widths of some layers, by name."""
    layers = [replace(layer, bits=bits.get(layer.name, layer.bits)) for layer in layers_plan.layers]
    return Plan(tuple(layers), layers_plan.skipped, *_sizes(model, layers))


def _check_exclusions(model: nn.Module, config: GuidedQuantConfig) -> None:
    """Refuse names and patterns that mean no module: a misspelt one would go unnoticed."""
    names = [name for name, _ in model.named_modules()]
    for pattern in config.modules_to_not_convert or ():
        if not any(matches(name, pattern) for name in names):
            raise ConfigError("modules_to_not_convert", pattern, f"names or patterns of modules, like {names[-1]!r}")


def _check_overrides(
    config: GuidedQuantConfig,
    layers: Sequence[LayerPlan],
    skipped: Mapping[str, str],
    vocabulary: tuple[str | None, str | None],
) -> None:
    """Refuse settings of what is not quantized, or goes by another name: they would do nothing."""
    others = {weight.rpartition(".")[0]: reason for weight, reason in skipped.items()}
    if config.embedding_bits is None:
        others |= {name: f"{others[name]}, without embedding_bits" for name in vocabulary if name in others}
    elif vocabulary[0] is not None:
        others.setdefault(vocabulary[0], f"tied to {vocabulary[1]}, which is quantized for both")
    for pattern in config.overrides:
        if not any(matches(layer.name, pattern) for layer in layers):
            reasons = (f"; {name} is not: {reason}" for name, reason in others.items() if matches(name, pattern))
            allowed = "names or patterns of layers that are quantized" + next(reasons, f", like {layers[0].name!r}")
            raise ConfigError("overrides", pattern, allowed)


def _skip_reason(
    name: str,
    module: nn.Module,
    parameter: nn.Parameter,
    owners: dict[int, list[str]],
    config: GuidedQuantConfig,
    vocabulary: tuple[str | None, str | None],
) -> str | None:
    if name == vocabulary[1] and config.embedding_bits is None:
        return "output head"
    if isinstance(module, nn.Embedding) and (name != vocabulary[0] or config.embedding_bits is None):
        return "embedding"
    if any(matches(name, pattern) for pattern in config.modules_to_not_convert or ()):
        return "modules_to_not_convert"
    if name == vocabulary[0] and not scaled_rows(module):
        return f"unsupported: {type(module).__name__} does more than to look up rows and to scale them"
    if name != vocabulary[0] and not is_linear(module):
        return f"unsupported: {type(module).__name__} is no plain linear layer"
    partners = vocabulary if name in vocabulary else (name,)
    shared = [owner for owner in owners[id(parameter)] if owner != name and owner not in partners]
    if shared:
        return f"weight is shared with {', '.join(shared)}"
    return None


def _reads_dtype(model: nn.Module, head: str | None) -> bool:
    """Whether the model casts what its output head is given to the dtype of the head's weight, as Mamba does."""
    try:
        source = inspect.getsource(inspect.unwrap(type(model).forward))
    except (OSError, TypeError):
        return False
    return head is not None and f"{head.rpartition('.')[2]}.weight.dtype" in source


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


def _layer(name: str, module: nn.Module, config: GuidedQuantConfig, vocabulary: bool) -> LayerPlan:
    settings = config.for_module(name, vocabulary)
    settings["bits"] = math.ceil(settings["bits"])
    out_features, in_features = linear_shape(module)
    # Embeddings are looked up without an overlay, and a head may have the same codes.
    settings["outliers"] = 0 if vocabulary else lut_format.outliers_per_row(in_features, config.outliers)
    groups = _groups(out_features, config.num_groups) if config.guided else 1
    if isinstance(module, nn.Embedding) and SOLVERS[settings["method"]].statistics != "none":
        # Nothing is multiplied with the rows, so there is no Hessian.
        settings["method"] = "kmeans"
    # A vocabulary squared is too many numbers.
    settings["output_curvature"] = config.output_curvature and settings["method"] == "lnq" and not vocabulary
    layer = LayerPlan(name, out_features, in_features, **settings, num_groups=groups)
    saving = [bits for bits in range(1, 9) if replace(layer, bits=bits).packed_bytes < 2 * layer.weights]
    if vocabulary and layer.bits not in saving:
        allowed = f"at most {max(saving)} with {in_features} weights per entry of the vocabulary" if saving else "None"
        raise ConfigError("embedding_bits", layer.bits, f"{allowed}, for codebooks to take less than is saved")
    return layer


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
    if (embeddings := quantized_embeddings(model, layers)) is not None:
        # Their scale.
        saved -= stored_weight(model.get_submodule(embeddings[0])).itemsize
    return dense, dense - saved
