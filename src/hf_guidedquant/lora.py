"""LoRA adapters of peft on quantized layers. Imported where peft is installed, once there is a quantized model."""

import copy
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from peft import PEFT_TYPE_TO_TUNER_MAPPING, PeftType
from peft.tuners.lora import Linear, LoraConfig, LoraModel
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists
from torch import nn
from transformers.pytorch_utils import Conv1D

from .errors import AdapterError
from .experts import unfused_experts
from .linears import vocabulary_layers
from .nn import GuidedEmbedding, GuidedLinear, quantized_modules

# Ways to begin an adapter that do not look at the dense weight of its layer.
_BLIND_BEGINNINGS = (True, False, "gaussian", "orthogonal", "eva")
# Where adapters go, and what depends on it.
_TARGETS = ("target_modules", "target_parameters", "rank_pattern", "alpha_pattern")


class GuidedLoraLinear(Linear):
    """A quantized layer with adapters: ``y = x @ W.T + bias + scaling * (x @ A.T) @ B.T``.

    ``A: [r, in_features]`` and ``B: [out_features, r]`` are fp32, as for any quantized layer in peft; what goes in and
    comes out, ``[..., in_features] -> [..., out_features]``, keeps its dtype.
    """

    def __init__(self, base_layer: nn.Module, *args: Any, **kwargs: Any) -> None:
        if isinstance(base_layer, GuidedEmbedding):
            raise AdapterError("Quantized embeddings take no adapters. Leave them out of target_modules.")
        super().__init__(base_layer, *args, **kwargs)

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether the weight is transposed: GPT-2's layers are when they are dense; quantized ones never are."""
        return isinstance(self.get_base_layer(), Conv1D)

    @fan_in_fan_out.setter
    def fan_in_fan_out(self, told: bool) -> None:
        """Left as it is: peft says what it was told, and the layer itself knows better."""

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        return module.in_features, module.out_features  # type: ignore[return-value]

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """Add the adapters to the weight, if the layer has been dequantized since.

        Raises:
            AdapterError: The layer is quantized.
        """
        _refuse_merging(self)
        super().merge(*args, **kwargs)


class GuidedLoraModel(LoraModel):
    """peft's ``LoraModel``, which knows quantized layers too. Of other models it makes what ``LoraModel`` does."""

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        self._asked_for = {name: copy.copy(getattr(self.peft_config[adapter_name], name)) for name in _TARGETS}
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        experts = tuple(f"{name}." for name in unfused_experts(model))
        if experts:
            # By now peft has turned experts' layers into parameters of fused experts, which these are not.
            for name, value in self._asked_for.items():
                setattr(peft_config, name, value)
        super()._prepare_model(peft_config, model)
        quantized = quantized_modules(model)
        if not quantized:
            return
        _check(peft_config)
        peft_config._register_custom_module({GuidedLinear: GuidedLoraLinear})
        targets = peft_config.target_modules
        if isinstance(targets, str) and targets.lower() == "all-linear":
            _maybe_include_all_linear_layers(peft_config, model)
            # peft itself finds the layers that have adapters already.
            vocabulary = vocabulary_layers(model)
            found = {name for name in quantized if name not in vocabulary and not name.endswith(".base_layer")}
            peft_config.target_modules = {n for n in peft_config.target_modules | found if not n.startswith(experts)}
        _check_targets(peft_config, [name for name in quantized if name.startswith(experts)])

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        for module in self.modules():
            if isinstance(module, GuidedLoraLinear):
                _refuse_merging(module)


def register(model: Any) -> None:
    """Make peft know quantized layers, and this model as one with such layers. Safe to call more than once."""
    if PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] is LoraModel:
        PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] = GuidedLoraModel
    # prepare_model_for_kbit_training has a list of methods whose models it must not cast to fp32, and whose gradient
    # checkpointing it turns on. This mark is the only one that is no claim about tensors or backends elsewhere.
    model.hqq_quantized = True


def _check(config: LoraConfig) -> None:
    """Refuse what would read codes as if they were weights, before the model is changed."""
    beginning = config.init_lora_weights
    if beginning not in _BLIND_BEGINNINGS:
        raise AdapterError(
            f"init_lora_weights={beginning!r} starts from dense weights. On quantized layers it must be True, False, "
            '"gaussian", "orthogonal" or "eva".'
        )
    variants = [f.name for f in fields(config) if f.metadata.get("is_lora_variant") and getattr(config, f.name)]
    if variants:
        raise AdapterError(f"LoraConfig.{variants[0]} is for dense layers. Leave it out on a quantized model.")


def _check_targets(config: LoraConfig, experts: Iterable[str]) -> None:
    """Refuse adapters on experts: peft would save them, but rename some of their tensors when it reads them back."""
    layer = next((name for name in experts if check_target_module_exists(config, name)), None)
    if layer is not None:
        raise AdapterError(
            f"Adapters cannot be put on experts, like {layer}. Name other layers in target_modules, such as "
            '["q_proj", "v_proj"], or use "all-linear", which leaves experts out.'
        )


def _refuse_merging(layer: GuidedLoraLinear) -> None:
    if isinstance(layer.get_base_layer(), GuidedLinear):
        raise AdapterError(
            "An adapter cannot be merged into codes. Keep it beside the quantized model, or make that dense first: "
            "model.dequantize(), then merge."
        )
