"""The same promises on a CUDA device."""

import copy

import pytest
import torch
import transformers
from conftest import memory_for, quantized_and_loaded, tiny_model, token_rows
from test_trained_linear import EPS, float64_gradient, random_layer
from transformers import AutoModelForCausalLM

import hf_guidedquant
from hf_guidedquant import GuidedQuantConfig
from hf_guidedquant.calibration import LayerStatistics, Outline, Relay, gram
from hf_guidedquant.distillation_folder import DistillationFolder
from hf_guidedquant.linears import is_linear
from hf_guidedquant.nn import codebook_gradient
from hf_guidedquant.resources import reproducible
from hf_guidedquant.solvers import Factors, SolverSpec, solve
from hf_guidedquant.solvers.hessian import condition

pytestmark = pytest.mark.gpu


def config(**changes):
    return GuidedQuantConfig(**{"bits": 2, "dataset": token_rows(), "num_groups": 3, **changes})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", ["llama-tied", "qwen3", "gemma3", "gpt2"])
def test_quantize_save_reload_generate(architecture, dtype, tmp_path):
    model, again = quantized_and_loaded(tiny_model(architecture), config(), dtype, tmp_path, device_map="auto")
    prompt = torch.arange(2, 10, device="cuda")[None]
    with torch.no_grad():
        assert torch.equal(again(input_ids=prompt).logits, model(input_ids=prompt).logits)
    tokens = again.generate(prompt, min_new_tokens=8, max_new_tokens=8, do_sample=False)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("epoch", [1, 2])
def test_a_distillation_that_was_cut_off_gives_the_same_codebooks(epoch, dtype, tmp_path, monkeypatch):
    """Also where steps are graphs, which are captured anew."""
    dense = tiny_model().to("cuda", dtype)
    settings = {"dataset": token_rows(4) * 2, "distill": {"batch_tokens": 64, "learning_rate": 0.01, "epochs": 3}}
    expected = hf_guidedquant.quantize(copy.deepcopy(dense), config(**settings)).state_dict()
    commit, kept = DistillationFolder.commit, []

    def cut_off(folder, epochs):
        commit(folder, epochs)
        kept.append(epochs)
        if len(kept) == epoch:
            raise KeyboardInterrupt

    monkeypatch.setattr(DistillationFolder, "commit", cut_off)
    with pytest.raises(KeyboardInterrupt):
        hf_guidedquant.quantize(copy.deepcopy(dense), config(**settings, run_dir=tmp_path))
    found = hf_guidedquant.quantize(dense, config(**settings, run_dir=tmp_path)).state_dict()
    assert len(kept) == 3
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("home", "codes"), [("cuda", True), ("cpu", True), ("cuda", False)])
def test_the_same_seed_gives_the_same_reconstructed_blocks(dtype, home, codes):
    """Also with weights that wait on the CPU and are on the GPU for their block's turn only."""
    dense = tiny_model().to(home, dtype)
    training = {"batch_tokens": 64, "epochs": 8, "learning_rate": 0.02, "latent_learning_rate": 0.01, "codes": codes}
    settings = config(dataset=token_rows(4) * 2, reconstruct=training)
    first, second = (hf_guidedquant.quantize(copy.deepcopy(dense), settings) for _ in range(2))
    assert any(block.kept for block in first.quantization_report.reconstruction.blocks)
    assert first.device.type == home
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
        statistics = {
            name: LayerStatistics.empty((2, module.in_features, module.in_features), torch.device(device))
            for name, module in model.named_modules()
            if is_linear(module) and module is not model.lm_head
        }
        with reproducible():
            Relay(model, Outline(), [(0, 0)], rows, guided=True).collect(0, statistics)
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


def test_outputs_together_do_as_well_as_on_the_cpu():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 50, 160, generator=generator)
    x = torch.randn(4, 500, 160, generator=generator) @ torch.randn(4, 160, 160, generator=generator)
    grads = torch.randn(2, 400, 99, generator=generator) @ torch.randn(2, 99, 99, generator=generator)
    left = {}
    for device in ("cpu", "cuda"):
        hessians = (x.mT @ x).to(device).split(2)
        factors = [
            Factors.of(grad.mT @ grad, hessian, "layer")
            for grad, hessian in zip(grads.to(device), hessians, strict=True)
        ]
        hessian = torch.cat([condition(each, "layer")[0] for each in hessians])
        with reproducible():
            solution = solve("lnq", weight.to(device), hessian, SolverSpec(2), Factors.together(factors))
        left[device] = solution.joint_left.cpu()
    # Two groups of 50 and 49 rows each; other rounding decides between codes that are almost as good.
    assert (left["cuda"] < 0.5).all()
    torch.testing.assert_close(left["cuda"], left["cpu"], rtol=0.1, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_are_multiplied_on_tensor_cores_as_they_are(dtype):
    generator = torch.Generator("cuda").manual_seed(0)
    x, grad = (torch.randn(300, size, device="cuda", generator=generator).to(dtype) for size in (64, 200))
    statistics = LayerStatistics.empty((1, 64, 64), torch.device("cuda"), curvature_shape=(200, 200))
    statistics.add(x, torch.ones(300, 1, device="cuda"), torch.ones((), dtype=torch.bool, device="cuda"), grad)
    exact = grad.double().mT @ grad.double()
    bound = 302 * torch.finfo(torch.float32).eps * (grad.abs().double().mT @ grad.abs().double())
    assert ((statistics.curvature.tril() - exact.tril()).abs() <= bound).all()


@pytest.mark.parametrize("guided", [True, False])
def test_no_row_waits_for_the_device(guided, monkeypatch):
    """Nothing of ours does; Transformers looks at the position ids of every row."""
    monkeypatch.setattr(transformers.masking_utils, "find_packed_sequence_indices", lambda position_ids: None)
    model, rows = tiny_model().cuda(), [row.cuda() for row in token_rows()]
    statistics = {
        name: LayerStatistics.empty((1, module.in_features, module.in_features), torch.device("cuda"))
        for name, module in model.named_modules()
        if is_linear(module) and module is not model.lm_head
    }
    relay, watched = Relay(model, Outline(), [(0, 0)], rows, guided=guided), []

    def without_waiting(*args, progress=relay._progress):
        try:
            for index in progress(*args):
                # Kernels are compiled for the first row.
                torch.cuda.set_sync_debug_mode("error" if index > 0 else "default")
                yield index
                watched.append(index)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(relay, "_progress", without_waiting)
    relay.collect(0, statistics)
    assert len(watched) == len(rows)


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


class TestWeightsInTheCpusMemory:
    """The GPU works, a segment of the model at a time; the result is that of weights on the GPU, in as many of them."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("architecture", ["llama-tied", "gpt2"])
    def test_segments_visit_the_gpu(self, architecture, dtype, caplog):
        dense = tiny_model(architecture, blocks=4).to(dtype)
        resident, waiting = copy.deepcopy(dense).cuda(), copy.deepcopy(dense)
        on_gpu = hf_guidedquant.quantize(resident, config(max_memory=memory_for(resident, config(), blocks=2)))
        visiting = hf_guidedquant.quantize(waiting, config(max_memory=memory_for(waiting, config(), blocks=2)))
        assert caplog.text.count("in 2 segments") == 2
        assert {tensor.device.type for tensor in visiting.state_dict().values()} == {"cpu"}
        for name, tensor in on_gpu.state_dict().items():
            assert torch.equal(tensor.cpu(), visiting.state_dict()[name]), name

    def test_the_cpu_works_if_asked_to(self):
        dense = tiny_model()
        asked = hf_guidedquant.quantize(copy.deepcopy(dense), config(device="cpu"))
        layers = hf_guidedquant.quantize(copy.deepcopy(dense), config()).state_dict()
        assert asked.state_dict().keys() == layers.keys()

    def test_a_model_larger_than_the_gpu_waits_outside(self, tmp_path):
        tiny_model(blocks=4).save_pretrained(tmp_path / "dense")
        limits = {0: "64KiB", "cpu": "8GiB"}
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path / "dense", device_map="auto", max_memory=limits, quantization_config=config()
        )
        assert {tensor.device.type for tensor in model.state_dict().values()} == {"cuda"}
        expected = hf_guidedquant.quantize(tiny_model(blocks=4).cuda(), config()).state_dict()
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, expected[name]), name
        prompt = torch.arange(2, 10, device="cuda")[None]
        assert model.generate(prompt, min_new_tokens=4, max_new_tokens=4).shape == (1, 12)
