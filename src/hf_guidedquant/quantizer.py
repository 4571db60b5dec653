"""The glue to Transformers: :class:`GuidedQuantizer` turns its hooks into calls of the pipeline."""

import copy
import logging
from collections.abc import Iterable
from typing import Any

import torch
from transformers.core_model_loading import WeightConverter, revert_weight_conversion
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer

from . import checkpoint, companions, pipeline
from .calibration.kinds import check_dataset
from .config import QUANT_METHOD, GuidedQuantConfig, check_bits
from .errors import CheckpointError, ModelError
from .experts import DOWN, fuse_experts, fused_experts, unfuse, unfused_experts
from .formats.lut import TensorSpec, outliers_per_row
from .linears import is_linear, linear_shape, scaled_rows, size_of, vocabulary_layers
from .nn import (
    GuidedEmbedding,
    GuidedLinear,
    dequantize_model,
    prepare_layers,
    quantized_modules,
    refuse_resizing,
    replace_module,
    tie_codes,
    tied_pairs,
    untie_codebooks,
)
from .resources import WEIGHTS_SHARE, check_device, compute_device, free_memory
from .run_folder import open_run_folder
from .triton_kernels import requested_backend
from .workers import Workers

logger = logging.getLogger(__name__)

# More than any model has in all its blocks: building them as modules would take hours.
_MOST_EXPERTS = 200_000
_LUT_DTYPES = {"float16": torch.float16, "float32": torch.float32}


def quantize(model: Any, config: GuidedQuantConfig | dict[str, Any]) -> Any:
    """Quantize a loaded model in place; the same result as ``from_pretrained(..., quantization_config=config)``.

    Args:
        model: A Transformers language model on any devices, in fp32, bf16 or fp16.
        config: What to do, as a config or a dictionary of its fields. It is copied, not changed.

    Returns:
        The model. It saves, pushes and generates like any other; ``model.quantization_report`` tells what was done.

    Raises:
        GuidedQuantError: See :func:`hf_guidedquant.pipeline.run`. The model is unchanged then, unless it is distilled
            already: without that it is quantized as well.
        ValueError: ``HF_GUIDEDQUANT_KERNELS`` names no kernels. The model is unchanged.
    """
    settings = GuidedQuantConfig(**config) if isinstance(config, dict) else config
    quantizer = GuidedQuantizer(settings, pre_quantized=False)
    try:
        quantizer.calibrate_and_swap(model)
    finally:
        if quantizer.has_swapped:
            model.hf_quantizer = quantizer
            model.is_quantized = True
            model.quantization_method = QUANT_METHOD
            model.config._is_quantized = True
    return model


class GuidedQuantizer(HfQuantizer):
    """Quantizes a model after its weights are loaded, or prepares one for weights that are quantized already."""

    requires_calibration = False

    def __init__(self, quantization_config: GuidedQuantConfig, **kwargs: Any) -> None:
        # A name of kernels that do not exist must not be noticed after hours of work.
        requested_backend()
        # A copy, because quantization fills in the modules and the provenance.
        super().__init__(copy.deepcopy(quantization_config), **kwargs)  # type: ignore[arg-type]
        self.quantization_config: GuidedQuantConfig
        self._dense_bytes = 0
        self._waits_on_cpu = False
        self.has_swapped = False
        # Of experts that are linear layers here, the names of their tensors and of what those would be fused to; and
        # the conversions that do that.
        self._expert_tensors: list[str] = []
        self._set_aside: list[Any] = []
        self._has_experts = False

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        if self.pre_quantized:
            return
        pipeline.check_grad_mode()
        check_device(self.quantization_config.device or "cpu")
        check_dataset(self.quantization_config.dataset, self.quantization_config.assistant_only_loss)
        with open_run_folder(self.quantization_config.run_dir if Workers().first else None):
            pass  # A folder that cannot be used must not be noticed after the weights are loaded.
        places = {str(place) for place in device_map.values()} if isinstance(device_map, dict) else set()
        if "disk" in places or ("cpu" in places and len(places) > 1):
            raise ModelError(
                f"The device map offloads parts of the model ({', '.join(sorted(places))}), so they cannot be "
                'quantized. Load the model whole: device_map="cpu", or a device map of GPUs only.'
            )

    def adjust_max_memory(self, max_memory: dict[str, int | str]) -> dict[str, int | str]:
        """Leave room for Hessians beside the full-precision weights.

        A model that is larger than the GPUs waits in the CPU's memory, block by block taking its turn on a GPU.
        """
        if self.pre_quantized:
            return max_memory
        limits = {
            key: int(value * WEIGHTS_SHARE) if isinstance(value, int) else value for key, value in max_memory.items()
        }
        if self._dense_bytes > sum(value for key, value in limits.items() if key != "cpu" and isinstance(value, int)):
            self._waits_on_cpu = True
            return {key: value if key == "cpu" else 0 for key, value in limits.items()}
        return limits

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **kwargs: Any) -> None:
        if not self.pre_quantized:
            self._dense_bytes = size_of(model)
            return
        self._expert_tensors = _unfuse_quantized(model, self.quantization_config)
        modules = _resolve_modules(model, self.quantization_config)
        _check_ties(model, modules)
        vocabulary = vocabulary_layers(model)
        for name, (bits, lut_dtype) in modules.items():
            share = 0.0 if name in vocabulary else self.quantization_config.outliers
            replace_module(model, name, _empty_layer(model.get_submodule(name), bits, lut_dtype, share))
        tie_codes(model)
        if checkpoint_files:
            _preflight(model, checkpoint_files)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        if not self.pre_quantized:
            self.calibrate_and_swap(model, freshly_loaded=True)
            return
        for module in quantized_modules(model).values():
            module.requires_grad_(False)
        tie_codes(model, loaded=True)
        checkpoint.check_layers(model)
        self._prepare_layers(model)
        companions.attach_saving(model, report=None)

    def calibrate_and_swap(self, model: Any, freshly_loaded: bool = False) -> None:
        """Run the pipeline on a loaded model and leave it as a quantized one."""
        report = None
        try:
            report = pipeline.run(model, self.quantization_config, freshly_loaded)
        finally:
            # Not distilled to the end, it is a whole quantized model still, but for experts, which are fused again.
            there, modules = quantized_modules(model), self.quantization_config.modules
            self.quantization_config.modules = {name: modules[name] for name in modules if name in there}
            self.has_swapped = bool(self.quantization_config.modules)
            if self.has_swapped:
                self._finish(model, report)

    def _finish(self, model: Any, report: Any) -> None:
        """Leave a model whose layers have been swapped as a quantized one."""
        config = self.quantization_config
        if self._waits_on_cpu:
            _move_to_gpu(model, config)
        # The config stays on the model: the data must not.
        config.dataset, config.tokenizer, config.run_dir, config.statistics = "builtin", None, None, None
        model.config.quantization_config = config
        self._prepare_layers(model)
        companions.attach_saving(model, report)

    def _prepare_layers(self, model: Any) -> None:
        config = self.quantization_config
        prepare_layers(model, config.fuse_layers, config.cache_dequantized)
        refuse_resizing(model)
        self._has_experts = bool(unfused_experts(model))
        _allow_adapters(model)

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        # Of a model that has been saved, transformers knows the dtype by its name.
        dequantize_model(model, getattr(torch, dtype) if isinstance(dtype, str) else dtype or model.dtype)
        untie_codebooks(model)
        if unfused_experts(model):
            fuse_experts(model)
            # Fused again, they are saved the way that they are in the original's files.
            if (conversions := getattr(model, "_weight_conversions", None)) is not None:
                model._weight_conversions = [*conversions, *self._set_aside]
                self._set_aside = []
        return model

    def update_weight_conversions(self, weight_conversions: Any, *args: Any) -> Any:
        """Our tensors are loaded as they are, so what fuses those of experts is set aside."""
        self._set_aside = [conversion for conversion in weight_conversions if self._catches_experts(conversion)]
        return [conversion for conversion in weight_conversions if conversion not in self._set_aside]

    def _catches_experts(self, conversion: Any) -> bool:
        if not isinstance(conversion, WeightConverter):
            return False
        return any(
            conversion.rename_source_key(name)[1] is not None or any(map(name.endswith, conversion.target_patterns))
            for name in self._expert_tensors
        )

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Gradients reach the activations, so adapters can be trained on top; codes and codebooks stay frozen."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Whether ``generate`` compiles a step by itself. Which experts run is the host's decision, token by token."""
        return not self._has_experts


def _allow_adapters(model: Any) -> None:
    try:
        from . import lora
    except ImportError as error:
        logger.debug("No LoRA adapters: %s", error)
    else:
        lora.register(model)


def _move_to_gpu(model: Any, config: GuidedQuantConfig) -> None:
    """Take a model that has become small enough to where ``device_map="auto"`` would have it."""
    device = compute_device(torch.device("cpu"), config.device)
    size, free = size_of(model), free_memory(device)
    if size < 0.9 * free:
        model.to(device)
    else:
        logger.warning(
            "The quantized model (%.1f GiB) stays in the CPU's memory: %s has %.1f GiB free. Save it, and load it with "
            'device_map="auto".',
            size / 2**30,
            device,
            free / 2**30,
        )


def _unfuse_quantized(model: Any, config: GuidedQuantConfig) -> list[str]:
    """Make experts linear layers if the config lists any of those; returns names of tensors, before and after."""
    saved = {alias for name in config.modules for alias in aliases(model, name)}
    fused = fused_experts(model)
    if not any(name.startswith(f"{experts}.") for experts in fused for name in saved):
        return []
    count = sum(len(experts.get_parameter(DOWN)) for experts in fused.values())
    if count > _MOST_EXPERTS:
        raise CheckpointError(f"config.json: the model has {count:,} experts; up to {_MOST_EXPERTS:,} are allowed.")
    return [
        f"{name}.{key}"
        for name, fused in unfuse(model).items()
        for experts in (fused, model.get_submodule(name))
        for key in experts.state_dict()
    ]


def _resolve_modules(model: Any, config: GuidedQuantConfig) -> dict[str, tuple[int, torch.dtype]]:
    """Module name in this model -> bits and codebook dtype, for every module that the config lists.

    A checkpoint of a causal language model can be loaded as its bare body, and the other way round: names then differ
    by the body's prefix, and the head's names do not exist.
    """
    if not config.modules:
        raise CheckpointError("config.json lists no quantized modules; it was not written by hf-guidedquant.")
    known = dict(model.named_modules())
    resolved = {}
    absent = []
    for saved_name, settings in config.modules.items():
        bits, lut_dtype = _module_settings(saved_name, settings)
        name = next((n for n in aliases(model, saved_name) if n in known), None)
        if name is None:
            absent.append(saved_name)
            continue
        is_embeddings = name == vocabulary_layers(model)[0] and scaled_rows(known[name])
        if not (is_embeddings or is_linear(known[name])):
            raise CheckpointError(
                f"{saved_name} is quantized in the checkpoint, but a {type(known[name]).__name__} here."
            )
        resolved[name] = (bits, lut_dtype)
    if not resolved:
        raise CheckpointError(
            f"None of the checkpoint's quantized modules (first: {absent[0]}) exists in {type(model).__name__}."
        )
    return resolved


def _check_ties(model: Any, modules: dict[str, tuple[int, torch.dtype]]) -> None:
    """Refuse one copy of two modules' weights that only one of them could read."""
    for source, target in tied_pairs(model):
        if modules.get(source) != modules.get(target):
            raise CheckpointError(
                f"config.json: {source} and {target} are tied, so their entries in modules must be there, and equal."
            )


def _empty_layer(old: Any, bits: int, lut_dtype: torch.dtype, outliers: float) -> GuidedLinear:
    """What takes the place of a dense layer, before its tensors are loaded."""
    out_features, in_features = linear_shape(old)
    device = old.weight.device
    if isinstance(old, torch.nn.Embedding):
        return GuidedEmbedding(
            out_features,
            in_features,
            bits,
            padding_idx=old.padding_idx,
            lut_dtype=lut_dtype,
            dtype=old.weight.dtype,
            device=device,
        )
    bias = old.bias is not None
    dtype = old.bias.dtype if bias else None
    return GuidedLinear(
        in_features,
        out_features,
        bits,
        bias,
        lut_dtype=lut_dtype,
        dtype=dtype,
        device=device,
        outliers=outliers_per_row(in_features, outliers),
    )


def _module_settings(name: str, settings: Any) -> tuple[int, torch.dtype]:
    if not isinstance(settings, dict):
        raise CheckpointError(f"config.json: modules[{name!r}] is {settings!r:.200}; it must be like {{'bits': 3}}.")
    check_bits(f"modules[{name!r}]['bits']", settings.get("bits"))
    lut_dtype = settings.get("lut_dtype", "float16")
    if not isinstance(lut_dtype, str) or lut_dtype not in _LUT_DTYPES:
        raise CheckpointError(
            f"config.json: modules[{name!r}]['lut_dtype'] is {lut_dtype!r:.200}; it must be float16 or float32."
        )
    return settings["bits"], _LUT_DTYPES[lut_dtype]


def aliases(model: Any, name: str) -> Iterable[str]:
    """Names that a module of a model can have in a checkpoint, and the other way round: a body lacks its prefix."""
    prefix = getattr(model, "base_model_prefix", "")
    yield name
    if prefix:
        yield name.removeprefix(prefix + ".")
        yield f"{prefix}.{name}"


def _preflight(model: Any, files: Iterable[Any]) -> None:
    """Find the tensors that this model needs in the headers of a checkpoint, by the names it saves them under."""
    checkpoint.check_files(files, model.config.name_or_path)
    found = checkpoint.read_headers(files)
    layers = set(quantized_modules(model))
    quantized, body, others = {}, {}, {}
    inside = getattr(model, "base_model_prefix", "") + "."
    is_body = getattr(model, "base_model", model) is model
    # Names and shapes as transformers writes them, which for some architectures are not the model's own.
    for name, tensor in revert_weight_conversion(model, model.state_dict()).items():
        spec = TensorSpec(tuple(tensor.shape), tensor.dtype)
        saved_name = next((alias for alias in aliases(model, name) if alias in found), name)
        if name.rpartition(".")[0] in layers:
            quantized[saved_name] = spec
        elif is_body or name.startswith(inside):
            body[saved_name] = spec
        else:
            others[saved_name] = spec
    # Under the class that was saved, the checkpoint must hold the model's tensors, all of them and no others; under
    # another class the body's.
    same_class = type(model).__name__ in (model.config.architectures or ())
    expected = body | others if same_class else body
    checkpoint.preflight(found, quantized, expected, exact=same_class, ignore=tied_names(model, found))


def tied_names(model: Any, found: Iterable[str]) -> set[str]:
    """Names that a checkpoint need not hold, because it holds the weight that they are tied to."""
    state, found = model.state_dict(), set(found)
    ignored = set()
    for pair in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        here, there = (
            {alias for saved in revert_weight_conversion(model, {n: state[n]}) for alias in aliases(model, saved)}
            for n in pair
        )
        ignored |= (there if here & found else set()) | (here if there & found else set())
    return ignored


def register() -> None:
    """Make ``quant_method: "guidedquant"`` known to Transformers. Safe to call more than once."""
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = GuidedQuantConfig
    auto.AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = GuidedQuantizer
    # Config classes whose loading attributes from_pretrained honours for models that are quantized already.
    types = getattr(auto, "LOADING_ATTRIBUTES_CONFIG_TYPES", None)
    if isinstance(types, tuple) and GuidedQuantConfig not in types:
        auto.LOADING_ATTRIBUTES_CONFIG_TYPES = (*types, GuidedQuantConfig)


__all__ = ["GuidedQuantizer", "quantize", "register"]
