"""LoRA adapters of peft on quantized layers. Imported where peft is installed, once there is a quantized model."""

from dataclasses import fields
from typing import Any

from peft import PEFT_TYPE_TO_TUNER_MAPPING, PeftType
from peft.tuners.lora import Linear, LoraConfig, LoraModel
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers
from torch import nn

from .errors import AdapterError
from .linears import vocabulary_layers
from .nn import GuidedEmbedding, GuidedLinear, quantized_modules

# Ways to begin an adapter that do not look at the dense weight of its layer.
_BLIND_BEGINNINGS = (True, False, "gaussian", "orthogonal", "eva")


class GuidedLoraLinear(Linear):
    """A quantized layer with adapters: ``y = x @ W.T + bias + scaling * (x @ A.T) @ B.T``.

    ``A: [r, in_features]`` and ``B: [out_features, r]`` are fp32, as for any quantized layer in peft; what goes in and
    comes out, ``[..., in_features] -> [..., out_features]``, keeps its dtype.
    """

    def __init__(self, base_layer: nn.Module, *args: Any, **kwargs: Any) -> None:
        if isinstance(base_layer, GuidedEmbedding):
            raise AdapterError("Quantized embeddings take no adapters. Leave them out of target_modules.")
        super().__init__(base_layer, *args, **kwargs)
        # GPT-2's layers are transposed when they are dense; quantized ones never are.
        self.fan_in_fan_out = False

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

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
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
            peft_config.target_modules |= {
                name for name in quantized if name not in vocabulary and not name.endswith(".base_layer")
            }

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


def _refuse_merging(layer: GuidedLoraLinear) -> None:
    if isinstance(layer.get_base_layer(), GuidedLinear):
        raise AdapterError(
            "An adapter cannot be merged into codes. Keep it beside the quantized model, or make that dense first: "
            "model.dequantize(), then merge."
        )
