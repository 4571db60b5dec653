"""GuidedLinear with tiles in memory, bit-planes everywhere else; fused products.

On a CPU the layers are made to believe that it has tensor cores: the ops on tiles work there too, in plain torch.
"""

import copy
import pickle

import pytest
import torch
from conftest import tiny_model, token_rows
from transformers import AutoModelForCausalLM

import hf_guidedquant
from hf_guidedquant import GuidedQuantConfig
from hf_guidedquant.nn import guided_linear, quantized_modules

PROMPT = torch.arange(2, 12)[None]


class Tensorcores:
    """A device whose layers hold tiles, and the way there and back."""

    def __init__(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.name, self._here = name, False
        if name == "cpu":
            monkeypatch.setattr(guided_linear, "backend_for", lambda device: "tensor_core" if self._here else "torch")

    def there(self, model):
        self._here = True
        return model.to(self.name)

    def back(self, model):
        self._here = False
        return model.cpu()

    def same(self, actual, expected) -> None:
        """Equal; on a GPU up to some twenty fp16 roundings, because other shapes are summed in another order there."""
        atol = 0 if self.name == "cpu" else 2e-2 * float(expected.abs().max())
        torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    return Tensorcores(request.param, monkeypatch)


def quantized(bits=3, dtype=torch.float16, **changes):
    config = GuidedQuantConfig(bits=bits, dataset=token_rows(), **changes)
    return hf_guidedquant.quantize(tiny_model("llama").to(dtype), config)


def logits(model):
    with torch.no_grad():
        return model(input_ids=PROMPT.to(model.device)).logits


def fused(model):
    return {id(m.fusion) for m in quantized_modules(model).values() if m.fusion is not None and m.fusion.ready}


@pytest.mark.parametrize(("bits", "outliers"), [(2, 0), (3, 0), (4, 0), (5, 0), (3, 0.03)])
def test_moving_changes_the_layout_and_nothing_else(bits, outliers, device):
    cpu = quantized(bits=bits, outliers=outliers)
    expected, answers = cpu.state_dict(), logits(cpu)
    model = device.there(copy.deepcopy(cpu))
    assert all(module.tiled == (bits != 5) for module in quantized_modules(model).values())
    device.same(logits(model).cpu(), answers)
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for name, tensor in other.state_dict().items():
            assert tensor.shape == expected[name].shape, name
            assert torch.equal(tensor.cpu(), expected[name]), name
    device.back(model)
    assert not any(module.tiled for module in quantized_modules(model).values())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert torch.equal(logits(model), answers)


def test_state_dict_of_another_model_is_taken_up(device):
    first, second = device.there(quantized()), device.there(quantized(seed=1, guided=False))
    expected = logits(second)
    assert not torch.equal(logits(first), expected)
    first.load_state_dict(second.state_dict())
    assert torch.equal(logits(first), expected)
    assert all(module.tiled for module in quantized_modules(first).values())
    assert len(fused(first)) == 4


@pytest.mark.parametrize("outliers", [0, 0.03])
def test_fusion_changes_no_result_and_no_state(outliers, device):
    model = device.there(quantized(outliers=outliers))
    assert len(fused(model)) == 4  # q/k/v and gate/up of two layers
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    together = logits(model)
    hf_guidedquant.unfuse(model)
    assert not fused(model)
    apart = logits(model)
    assert hf_guidedquant.fuse(model) == 4
    assert hf_guidedquant.fuse(model) == 0
    assert torch.equal(logits(model), together)
    device.same(together, apart)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("outliers", [0, 0.03])
def test_fusion_stores_nothing_twice_and_the_state_dict_shares_nothing(outliers, device):
    layer = device.there(quantized(outliers=outliers)).model.layers[0].self_attn
    parts = (layer.q_proj, layer.k_proj, layer.v_proj)
    names = ["weight", "lut"] + ["overlay_values", "overlay_columns"] * bool(outliers)
    for name in names:
        storages = [getattr(part, name).untyped_storage() for part in parts]
        assert len({storage.data_ptr() for storage in storages}) == 1
        assert storages[0].nbytes() == sum(getattr(part, name).nbytes for part in parts)
    saved = [t.untyped_storage().data_ptr() for name, t in layer.state_dict().items() if "o_proj" not in name]
    assert len(set(saved)) == len(saved) == 3 * len(names)


@pytest.mark.parametrize("outliers", [0, 0.03])
def test_a_fused_layer_called_by_itself_or_in_another_order(outliers, device):
    layer = device.there(quantized(outliers=outliers)).model.layers[0].self_attn
    parts = [layer.q_proj, layer.k_proj, layer.v_proj]
    x = torch.randn(3, 64, device=device.name, dtype=torch.float16)
    expected = [part(x) for part in parts]
    assert parts[0].fusion._latest is None  # everything was fetched: nothing is kept alive
    for order in ([2, 0, 1], [1], [1, 1], [0, 2], [2, 1, 0]):
        for i in order:
            assert torch.equal(parts[i](x), expected[i])
    other = x + 1
    assert torch.equal(parts[0](other), parts[0](other.clone()))
    # The same tensor with other content is not the same activations.
    changing = x.clone()
    parts[0](changing)
    changing.add_(1)
    assert torch.equal(parts[1](changing), parts[1](other))
    # Nor are they with gradients what they were without.
    x = x.clone().requires_grad_()
    with torch.no_grad():
        parts[0](x)
    assert parts[1](x).requires_grad
    together, alone = parts[0](torch.cat([x] * 30)), parts[0](x).repeat(30, 1)  # too many tokens to share
    if device.name == "cuda" and outliers:
        # Other kernels there: the product and the one with the overlay are rounded to fp16, twice each at most.
        bound = 4 * torch.finfo(torch.float16).eps * float(alone.abs().max())
        torch.testing.assert_close(together, alone, rtol=0, atol=bound)
    else:
        assert torch.equal(together, alone)
    with torch.inference_mode():
        inside = x.detach() * 1
        assert torch.equal(parts[2](inside), expected[2])


def test_layers_that_never_see_the_same_tensor_are_given_up(device):
    layer = device.there(quantized()).model.layers[0].self_attn
    inputs = torch.randn(20, 3, 64, device=device.name, dtype=torch.float16)
    for x in inputs[:4]:
        layer.q_proj(x)
    assert layer.q_proj.fusion.ready  # a few times may be chance
    for x in inputs:
        layer.q_proj(x)
    assert not layer.q_proj.fusion.ready
    assert layer.q_proj.fusion._latest is None
    expected = layer.k_proj(inputs[0])
    hf_guidedquant.unfuse(layer)
    assert torch.equal(layer.k_proj(inputs[0]), expected)


def test_fused_layers_are_not_fused_where_they_differ(device):
    config = {"overrides": {"*.k_proj": {"bits": 4}, "*.1.mlp.up_proj": {"bits": 2}}}
    model = device.there(quantized(**config))
    assert len(fused(model)) == 1  # gate/up of the first layer
    hf_guidedquant.unfuse(model)
    apart = logits(model)
    hf_guidedquant.fuse(model)
    device.same(logits(model), apart)


@pytest.mark.parametrize("outliers", [0, 0.03])
def test_fused_layers_of_a_compiled_model(outliers, device):
    torch._dynamo.reset()
    mlp = device.there(quantized(outliers=outliers)).model.layers[0].mlp
    x = torch.randn(1, 2, 64, device=device.name, dtype=torch.float16)
    compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager" if device.name == "cpu" else "inductor")
    with torch.no_grad():
        for _ in range(3):
            expected = mlp(x)
            torch.testing.assert_close(compiled(x), expected, rtol=0, atol=2e-3 * float(expected.abs().max()))
            x = x + 1
    assert mlp.gate_proj.fusion._latest is None


def test_fusion_can_be_turned_off(device, tmp_path):
    quantized().save_pretrained(tmp_path)
    for fuse_layers in (True, False):
        settings = GuidedQuantConfig(fuse_layers=fuse_layers)
        model = device.there(AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=settings))
        assert bool(fused(model)) == fuse_layers
        model.save_pretrained(tmp_path / str(fuse_layers))
    files = [(tmp_path / str(on) / "model.safetensors").read_bytes() for on in (True, False)]
    assert files[0] == files[1] == (tmp_path / "model.safetensors").read_bytes()


def test_fused_layers_are_as_independent_as_others(device):
    mlp = device.there(quantized(dtype=torch.float32)).model.layers[0].mlp
    gate, up = mlp.gate_proj, mlp.up_proj
    x = torch.randn(2, 3, 64, device=device.name)
    with torch.no_grad():
        assert gate(x).view(-1).shape == (2 * 3 * 96,)
    y = x.clone().requires_grad_()
    first, second = gate(y), up(y)
    first.sum().backward()
    second.sum().backward()
    torch.nn.functional.silu(gate(y), inplace=True).sum().backward()
    # A bias that is trained, changed in place, given other data, replaced; and other codes.
    for bias in (gate.bias, up.bias):
        bias.requires_grad_(True)
    (gate(x) + up(x)).sum().backward()
    assert gate.bias.grad is not None
    assert torch.equal(gate.bias.grad, up.bias.grad)
    kept = gate.bias
    mlp.to(device.name)
    assert gate.bias is kept
    with torch.no_grad():
        before = up(x)
        up.bias.add_(1)
        gate(x)
        torch.testing.assert_close(up(x), before + 1)
        up.bias.data = up.bias.data + 1
        gate(x)
        torch.testing.assert_close(up(x), before + 2)
        up.bias = torch.nn.Parameter(up.bias + 1)
        gate(x)
        torch.testing.assert_close(up(x), before + 3)
        zeros = torch.func.functional_call(gate, {"lut": 0 * gate.lut}, (x,))
        assert torch.equal(zeros, gate.bias.expand_as(zeros))


def test_casting_fused_layers_is_casting_each(device):
    model = device.there(quantized(dtype=torch.float32))
    body = torch.nn.ModuleList([model.model])
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        body.to(dtype)
        for name, module in quantized_modules(model).items():
            assert module.lut.dtype == torch.float16, name
            assert module.bias is None or module.bias.dtype == dtype, name
        assert len(fused(model)) == 4


def test_replacing_a_fused_layer_leaves_the_others_right(device):
    model = device.there(quantized())
    mlp = model.model.layers[0].mlp
    x = torch.randn(3, 64, device=device.name, dtype=torch.float16)
    expected = mlp.up_proj(x)
    hf_guidedquant.nn.replace_module(mlp, "gate_proj", torch.nn.Identity())
    assert mlp.up_proj.fusion is None
    device.same(mlp.up_proj(x), expected)


def test_gradients_reach_the_activations_of_fused_layers(device):
    mlp = device.there(quantized(dtype=torch.float32)).model.layers[0].mlp
    x = torch.randn(4, 64, device=device.name, requires_grad=True)
    (mlp.gate_proj(x).square().sum() + mlp.up_proj(x).sum()).backward()
    gate, up = (layer.dequantize(torch.float32) for layer in (mlp.gate_proj, mlp.up_proj))
    bias = mlp.gate_proj.bias
    expected = 2 * (x @ gate.mT + bias) @ gate + up.sum(dim=0)
    torch.testing.assert_close(x.grad, expected.detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_offloaded_layers_still_work(tmp_path):
    cpu = quantized()
    cpu.save_pretrained(tmp_path)
    device_map = {"model.embed_tokens": 0, "lm_head": 0, "model.norm": 0, "model.rotary_emb": 0}
    device_map |= {"model.layers.0": 0, "model.layers.1": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map)
    kinds = {name: module.tiled for name, module in quantized_modules(model).items()}
    assert {kind for name, kind in kinds.items() if ".0." in name} == {True}
    expected = logits(cpu)
    torch.testing.assert_close(logits(model).cpu(), expected, rtol=0, atol=2e-2 * float(expected.abs().max()))
