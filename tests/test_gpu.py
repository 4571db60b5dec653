"""The same promises on a CUDA device."""

import copy

import pytest
import torch
from conftest import tiny_model, token_rows
from test_trained_linear import EPS, float64_gradient, random_layer
from transformers import AutoModelForCausalLM

import hf_guidedquant
from hf_guidedquant import GuidedQuantConfig
from hf_guidedquant.calibration import LayerStatistics, collect, gram
from hf_guidedquant.linears import is_linear
from hf_guidedquant.nn import codebook_gradient
from hf_guidedquant.resources import reproducible

pytestmark = pytest.mark.gpu


def config(**changes):
    return GuidedQuantConfig(**{"bits": 2, "dataset": token_rows(), "num_groups": 3, **changes})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", ["llama-tied", "qwen3", "gemma3", "gpt2"])
def test_quantize_save_reload_generate(architecture, dtype, tmp_path):
    tiny_model(architecture).save_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", dtype=dtype, device_map="auto", quantization_config=config()
    )
    model.save_pretrained(tmp_path / "m")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "m", device_map="cuda:0")
    prompt = torch.arange(2, 10, device="cuda")[None]
    with torch.no_grad():
        assert torch.equal(again(input_ids=prompt).logits, model(input_ids=prompt).logits)
    tokens = again.generate(prompt, max_new_tokens=8, do_sample=False)
    assert tokens.shape == (1, 16)


def test_static_cache_and_compile_generate_the_same(tmp_path):
    model = hf_guidedquant.quantize(tiny_model().cuda(), config())
    prompt = torch.arange(2, 10, device="cuda")[None]
    expected = model.generate(prompt, max_new_tokens=12, do_sample=False)
    compiled = model.generate(prompt, max_new_tokens=12, do_sample=False, cache_implementation="static")
    assert torch.equal(expected, compiled)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_seed_gives_the_same_tensors(dtype):
    dense = tiny_model().to("cuda", dtype)
    first, second = (hf_guidedquant.quantize(copy.deepcopy(dense), config()) for _ in range(2))
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_seed_gives_the_same_trained_codebooks(dtype):
    dense = tiny_model().to("cuda", dtype)
    settings = config(dataset=token_rows(4) * 2, distill={"batch_tokens": 64, "learning_rate": 0.01})
    first, second = (hf_guidedquant.quantize(copy.deepcopy(dense), settings) for _ in range(2))
    assert first.quantization_report.distillation.best_epoch > 0
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [2, 4])
def test_the_codebooks_gradient_is_that_of_float64_autograd(bits, dtype):
    codes, layer = random_layer(bits, 133, 320)
    x, grad = torch.randn(200, 320).to(dtype), torch.randn(200, 133).to(dtype)
    expected, magnitudes = float64_gradient(codes, grad, x, 2**bits)
    with reproducible():
        found = codebook_gradient(grad.cuda(), x.cuda(), layer.bit_planes().cuda()).cpu()
    # Tensor cores cut off what they add up, which loses up to twice what rounding does.
    assert ((found - expected).abs() <= 2 * (200 + 320) * EPS * magnitudes).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_layers_and_statistics_give_the_same_tensors(dtype, tmp_path):
    """With gaps: half of the layers are taken from the folder, the others are solved with kept statistics."""
    dense = tiny_model().to("cuda", dtype)
    expected = hf_guidedquant.quantize(copy.deepcopy(dense), config()).state_dict()
    folders = {"run_dir": tmp_path / "run", "statistics": tmp_path / "statistics"}
    for _ in range(2):
        found = hf_guidedquant.quantize(copy.deepcopy(dense), config(**folders)).state_dict()
        for name, tensor in expected.items():
            assert torch.equal(tensor, found[name]) and tensor.device == found[name].device, name
        for path in sorted((tmp_path / "run" / "layers").iterdir())[::2]:
            path.unlink()


def test_hessians_agree_with_the_cpu():
    rows, found = token_rows(), {}
    for device in ("cpu", "cuda"):
        model = tiny_model().to(device)
        layers = {n: m for n, m in model.named_modules() if is_linear(m) and m is not model.lm_head}
        statistics = {
            name: LayerStatistics.empty((2, module.in_features, module.in_features), torch.device(device))
            for name, module in layers.items()
        }
        with reproducible():
            collect(model, layers, statistics, rows, guided=True, checkpointing=True)
        found[device] = {name: layer.hessian.cpu() for name, layer in statistics.items()}
    for name, expected in found["cpu"].items():
        # As against float64 in test_collector, twice: once for each device.
        bound = 2 * 40 * 96**0.5 * torch.finfo(torch.float32).eps * expected.abs().amax()
        assert (found["cuda"][name] - expected).abs().amax() <= bound, name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [72, 4500])
def test_products_on_tensor_cores_are_those_of_the_rounded_factors(size, dtype):
    generator = torch.Generator("cuda").manual_seed(size)
    x = torch.randn(300, size, device="cuda", generator=generator).to(dtype)
    weights = torch.rand(300, 2, device="cuda", generator=generator) * 1e-9
    valid = torch.ones((), dtype=torch.bool, device="cuda")
    for given in (weights, None):
        statistics = LayerStatistics.empty((2, size, size), torch.device("cuda"))
        for part in (slice(0, 200), slice(200, 300)):
            statistics.add(x[part], None if given is None else given[part], valid)
        for group, total in enumerate(statistics.hessian):
            gram.mirror(total)
            factor = x if given is None else (x * given[:, group : group + 1].sqrt()).bfloat16()
            exact = factor.double().mT @ factor.double()
            bound = 302 * torch.finfo(torch.float32).eps * (factor.abs().double().mT @ factor.abs().double())
            assert torch.equal(total, total.mT)
            assert ((total - exact).abs() <= bound).all()
        assert statistics.bad_rows == 0


def test_no_row_waits_for_the_device():
    model, rows = tiny_model().cuda(), token_rows()
    layers = {n: m for n, m in model.named_modules() if is_linear(m) and m is not model.lm_head}
    for guided in (True, False):
        statistics = {
            name: LayerStatistics.empty((1, module.in_features, module.in_features), torch.device("cuda"))
            for name, module in layers.items()
        }
        waits = []

        def look(tokens, waits=waits):
            # Watched from the second row on, until the pass is over.
            torch.cuda.set_sync_debug_mode("error" if len(waits) < len(rows) - 1 else "default")
            waits.append(tokens)

        try:
            collect(
                model, layers, statistics, [row.cuda() for row in rows], guided=guided, checkpointing=True, on_row=look
            )
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert len(waits) == len(rows)


def test_moving_to_the_device_and_casting_keep_codes_and_codebooks():
    model = hf_guidedquant.quantize(tiny_model(), config())
    layer = model.model.layers[0].mlp.up_proj
    weight, lut = layer.weight.clone(), layer.lut.clone()
    layer.to("cuda", torch.bfloat16)
    assert torch.equal(layer.bit_planes().cpu(), weight)
    assert torch.equal(layer.lut.cpu(), lut)
    assert layer.lut.dtype == torch.float16


def test_ops_agree_with_the_cpu_and_pass_opcheck():
    from hf_guidedquant.triton_kernels import lut_dequantize, lut_linear

    layer = hf_guidedquant.quantize(tiny_model(), config(bits=3)).model.layers[0].mlp.up_proj
    arguments = (layer.weight.data, layer.lut.data, layer.in_features, torch.float32)
    dense = lut_dequantize(*arguments)
    on_device = [tensor.cuda() for tensor in arguments[:2]]
    assert torch.equal(lut_dequantize(*on_device, *arguments[2:]).cpu(), dense)
    x = torch.randn(5, layer.in_features)
    expected = x.double() @ dense.double().T
    bound = layer.in_features * torch.finfo(torch.float32).eps * (x.abs().double() @ dense.abs().double().T)
    assert ((lut_linear(x.cuda(), *on_device).cpu() - expected).abs() <= bound).all()
    torch.library.opcheck(torch.ops.hf_guidedquant.lut_linear, (x.cuda(), *on_device, None))
