"""Outliers of a stranger's checkpoint: no kernel sees a column that is not an input of its layer."""

import functools
import json
from pathlib import Path

import pytest
import torch
from conftest import tiny_model, token_rows
from mutation import bounded_memory
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from victim import CONFIG, WEIGHTS, change_settings

import hf_guidedquant
from hf_guidedquant import GuidedQuantConfig
from hf_guidedquant.errors import CheckpointError, ConfigError, NonFiniteTensorError, OverlayError, TensorMismatchError
from hf_guidedquant.inspection import inspect

pytest_plugins = ["victim"]  # intact, folder, forbid_weights

LAYER = "model.layers.1.mlp.up_proj"  # 96 x 64, with two outliers a row


@functools.cache
def quantized():
    config = GuidedQuantConfig(bits=3, method="squeezellm", outliers=0.03, dataset=token_rows(4))
    return hf_guidedquant.quantize(tiny_model(), config)


@pytest.fixture
def forbid_products(monkeypatch):
    def reached(*args, **kwargs):
        raise AssertionError("an overlay was used")

    for name in ("lut_linear", "lut_linear_tiled", "lut_dequantize", "lut_dequantize_tiled"):
        monkeypatch.setattr(f"hf_guidedquant.nn.guided_linear.{name}", reached)


def change(folder: Path, **changes) -> None:
    """Replace tensors of :data:`LAYER` by what functions make of them; None takes one away."""
    tensors = load_file(folder / WEIGHTS)
    for key, make in changes.items():
        old = tensors.pop(f"{LAYER}.{key}", None)
        if make is not None:
            tensors[f"{LAYER}.{key}"] = make(old)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    (folder / "SHA256SUMS").unlink(missing_ok=True)


def with_one(row: int, place: int, value: int):
    def make(columns: torch.Tensor) -> torch.Tensor:
        columns[row, place] = value
        return columns

    return make


HOSTILE = {
    "one past the end": with_one(95, 1, 64),
    "far away": with_one(0, 1, 2**15 - 1),
    "negative": with_one(7, 0, -1),
    "the most negative": with_one(7, 0, -(2**15)),
    "twice": lambda columns: columns[:, :1].expand(-1, 2).contiguous(),
    "descending": lambda columns: columns.flip(1).contiguous(),
}


@pytest.mark.parametrize("what", list(HOSTILE))
def test_columns_that_are_no_inputs_are_refused_before_anything_is_computed(what, folder, forbid_products):
    change(folder, overlay_columns=HOSTILE[what])
    for load in (AutoModelForCausalLM.from_pretrained, functools.partial(inspect, verify=True)):
        (folder / "SHA256SUMS").unlink(missing_ok=True)
        with bounded_memory(), pytest.raises(CheckpointError) as refused:
            load(folder)
        # Without checksums --verify ends before it reads tensors.
        assert isinstance(refused.value, OverlayError) or "SHA256SUMS" in str(refused.value)


@pytest.mark.parametrize("what", list(HOSTILE))
def test_columns_that_are_no_inputs_are_found_by_verify_whatever_the_checksums_say(what, folder):
    from hf_guidedquant.checksums import write_checksums

    change(folder, overlay_columns=HOSTILE[what])
    write_checksums(folder)
    with pytest.raises(OverlayError, match=LAYER.replace(".", r"\.")):
        inspect(folder, verify=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused(value, folder):
    change(folder, overlay_values=lambda values: values.fill_(value))
    with pytest.raises(NonFiniteTensorError, match=LAYER):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"overlay_columns": None}, f"missing: {LAYER}.overlay_columns"),
        (
            {"overlay_values": None, "overlay_columns": None},
            f"missing: {LAYER}.overlay_columns, {LAYER}.overlay_values",
        ),
        ({"overlay_columns": torch.Tensor.int}, r"expected int16 \[96, 2\], got int32 \[96, 2\]"),
        ({"overlay_columns": torch.Tensor.half}, r"expected int16 \[96, 2\], got float16 \[96, 2\]"),
        ({"overlay_values": torch.Tensor.float}, r"expected float16 \[96, 2\], got float32 \[96, 2\]"),
        ({"overlay_values": torch.Tensor.short}, r"expected float16 \[96, 2\], got int16 \[96, 2\]"),
        ({"overlay_columns": lambda c: c[:, :1].clone()}, r"expected int16 \[96, 2\], got int16 \[96, 1\]"),
        ({"overlay_columns": lambda c: c.flatten()}, r"expected int16 \[96, 2\], got int16 \[192\]"),
        ({"overlay_values": lambda v: v[:95].clone()}, r"expected float16 \[96, 2\], got float16 \[95, 2\]"),
        ({"overlay_offsets": lambda _: torch.zeros(97)}, f"not expected: {LAYER}.overlay_offsets"),
    ],
)
def test_overlays_of_another_shape_or_dtype_are_refused_before_weights_load(changes, told, folder, forbid_weights):
    change(folder, **changes)
    with pytest.raises(TensorMismatchError, match=told):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("share", [0, 0.001, 0.0001, 0.1])
def test_a_share_that_is_not_the_files_is_refused_before_weights_load(share, folder, forbid_weights):
    change_settings(folder, outliers=share)
    with bounded_memory(), pytest.raises(TensorMismatchError, match="overlay_"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("share", [-1, 0.2, 1e300, True, "0.03", None, [0.03], {}])
def test_a_share_out_of_range_is_refused_and_nothing_is_allocated(share, folder, forbid_weights):
    change_settings(folder, outliers=share)
    for load in (AutoModelForCausalLM.from_pretrained, inspect):
        with bounded_memory(), pytest.raises(ConfigError, match="outliers"):
            load(folder)


def test_nan_in_config_json_is_refused(folder, forbid_weights):
    text = (folder / CONFIG).read_text()
    (folder / CONFIG).write_text(text.replace('"outliers": 0.03', '"outliers": NaN'))
    assert json.loads((folder / CONFIG).read_text())["quantization_config"]["outliers"] != 0.03
    with pytest.raises(ConfigError, match="outliers"):
        AutoModelForCausalLM.from_pretrained(folder)
