"""Segments of decoder blocks: the same Hessians however the blocks are divided, one segment in memory at a time."""

import pytest
import torch
from conftest import memory_for, tiny_model, token_rows
from test_collector import linears

import hf_guidedquant
from hf_guidedquant import GuidedQuantConfig
from hf_guidedquant.calibration import Footprint, LayerStatistics, Relay, divide, outline
from hf_guidedquant.calibration import gather as gather_segment
from hf_guidedquant.calibration.footprint import has_twin
from hf_guidedquant.errors import CalibrationError, ModelError
from hf_guidedquant.linears import dense_weight
from hf_guidedquant.plan import plan_layers


def stay(device):
    return device


def relay_of(model, rows, borders, guided=True):
    return Relay(model, outline(model, rows[0].numel(), guided, stay), borders, rows, guided=guided)


def statistics_of(model, drawn, start, stop, groups=2):
    found = {}
    for name, module in linears(model).items():
        if start <= drawn.places[name] < stop:
            size = dense_weight(module).shape[1]
            found[name] = LayerStatistics.empty((groups, size, size), torch.device("cpu"))
    return found


def gather(model, rows, borders, guided=True, skip=(), labels=None):
    drawn = outline(model, rows[0].numel(), guided, stay)
    relay = Relay(model, drawn, borders, rows, guided=guided, labels=labels)
    found = {}
    for number in relay.order:
        if number not in skip:
            statistics = statistics_of(model, drawn, *borders[number])
            relay.collect(number, statistics)
            found |= statistics
    return {name: layer.hessian for name, layer in found.items()}


@pytest.fixture(params=["llama-tied", "qwen3", "gemma3", "gpt2"])
def four_blocks(request):
    return tiny_model(request.param, blocks=4)


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("borders", [[(0, 1), (1, 2), (2, 3), (3, 4)], [(0, 3), (3, 4)], [(0, 1), (1, 4)]])
def test_segments_change_nothing(four_blocks, rows, borders, guided):
    whole, divided = (gather(four_blocks, rows, parts, guided) for parts in ([(0, 4)], borders))
    assert whole.keys() == divided.keys() == linears(four_blocks).keys()
    for name, hessian in whole.items():
        assert hessian.abs().amax() > 0
        assert torch.equal(hessian, divided[name]), name


def test_segments_share_the_labels(rows):
    model = tiny_model(blocks=2)
    labels = [row.where(torch.arange(len(row)) % 3 == index % 3, -100) for index, row in enumerate(rows)]
    whole, divided = (gather(model, rows, parts, labels=labels) for parts in ([(0, 2)], [(0, 1), (1, 2)]))
    plain = gather(model, rows, [(0, 2)])
    for name, hessian in whole.items():
        assert torch.equal(hessian, divided[name]) and not torch.equal(hessian, plain[name]), name


@pytest.mark.parametrize("guided", [True, False])
def test_blocks_may_change_hidden_states_in_place(rows, guided):
    def change(module, args):
        args[0].mul_(1.5)

    model = tiny_model(blocks=3)
    for block in model.model.layers[1:]:
        block.input_layernorm.register_forward_pre_hook(change)
    whole, divided = (gather(model, rows, parts, guided) for parts in ([(0, 3)], [(0, 1), (1, 2), (2, 3)]))
    for name, hessian in whole.items():
        assert torch.equal(hessian, divided[name]), name


@pytest.mark.parametrize("guided", [True, False])
def test_segments_can_be_left_out(rows, guided):
    model, borders = tiny_model(blocks=4), [(0, 1), (1, 2), (2, 3), (3, 4)]
    whole = gather(model, rows, [(0, 4)], guided)
    some = gather(model, rows, borders, guided, skip=(0, 2) if guided else (1, 3))
    assert 0 < len(some) < len(whole)
    for name, hessian in some.items():
        assert torch.equal(hessian, whole[name]), name


def test_a_block_runs_once_to_be_read_and_once_to_be_calibrated(rows):
    model, runs = tiny_model(blocks=3), []
    for index, block in enumerate(model.model.layers):
        block.mlp.register_forward_pre_hook(lambda module, args, index=index: runs.append(index))
    relay = relay_of(model, rows[:1], [(0, 1), (1, 2), (2, 3)])
    runs.clear()
    for number in relay.order:
        relay.collect(number, statistics_of(model, relay.outline, number, number + 1))
    assert runs == [0, 1, 2, 1, 0]


def test_bad_rows_are_left_out_of_every_segment():
    model, rows = tiny_model(), token_rows(20)
    borders = [(0, 1), (1, 2)]
    good = gather(model, rows[:7] + rows[8:], borders)
    relay = relay_of(model, rows, borders)
    calls = iter(range(10**6))
    # Behind the last block: it runs when the last segment is calibrated, and at no other time.
    model.model.norm.register_forward_hook(lambda m, a, output: output * float("inf") if next(calls) == 7 else output)
    for number in relay.order:
        statistics = statistics_of(model, relay.outline, *borders[number])
        relay.collect(number, statistics)
        for name, layer in statistics.items():
            assert layer.bad_rows == 1
            assert torch.equal(layer.hessian, good[name]), name


def test_too_many_bad_rows_abort_the_first_segment(rows):
    model = tiny_model()
    relay = relay_of(model, rows, [(0, 1), (1, 2)])
    model.model.norm.register_forward_hook(lambda module, args, output: output * float("nan"))
    with pytest.raises(CalibrationError, match="8 of 8 calibration rows gave NaN or infinity in the loss"):
        relay.collect(1, statistics_of(model, relay.outline, 1, 2))


def test_the_model_is_left_as_it_was(rows):
    model = tiny_model(blocks=3).train()
    model.model.layers[0].eval()
    model.lm_head.weight.requires_grad_(False)
    relay = relay_of(model, rows, [(0, 1), (1, 2), (2, 3)])
    before = {name: (p.requires_grad, p.grad, p.data_ptr()) for name, p in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    own = [dict(module.__dict__) for module in model.modules()]
    with torch.no_grad():
        for number in relay.order:
            relay.collect(number, statistics_of(model, relay.outline, number, number + 1))
    assert {name: (p.requires_grad, p.grad, p.data_ptr()) for name, p in model.named_parameters()} == before
    assert [module.training for module in model.modules()] == modes
    assert [module.__dict__.keys() for module in model.modules()] == [attributes.keys() for attributes in own]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


class TestOutline:
    def test_blocks_in_order_and_what_runs_where(self):
        model = tiny_model("gpt2", blocks=3)
        drawn = outline(model, 16, True, stay)
        assert drawn.blocks == ("transformer.h.0", "transformer.h.1", "transformer.h.2")
        assert drawn.places["transformer.wte"] == 0
        assert drawn.places["transformer.h.1.mlp.c_fc"] == 1
        assert drawn.places["transformer.ln_f"] == drawn.places["lm_head"] == 2

    def test_alike_blocks_take_alike(self):
        drawn = outline(tiny_model(blocks=5), 32, True, stay)
        assert drawn.kept[1] == drawn.kept[2] == drawn.kept[3] > 0
        assert drawn.extra[1] == drawn.extra[2] == drawn.extra[3] > 0

    def test_what_a_row_takes_grows_with_its_tokens_and_blocks(self):
        model = tiny_model(blocks=4)
        short, long = (outline(model, tokens, True, stay) for tokens in (32, 64))
        assert long.kept[1] > 1.9 * short.kept[1]
        assert short.row_bytes([0, 1, 2, 3]) > short.row_bytes([2, 3]) > short.row_bytes([3]) > 0
        assert short.row_bytes([1, 2]) - short.row_bytes([1]) == short.kept[1]

    def test_without_gradients_hidden_states_are_all_that_stays(self):
        drawn = outline(tiny_model(blocks=4), 32, False, stay)
        assert drawn.kept[1:3] == (0, 0)

    def test_a_model_on_the_meta_device(self):
        with torch.device("meta"):
            model = tiny_model(blocks=4)
        assert outline(model, 32, True, lambda device: torch.device("cpu")) == outline(
            tiny_model(blocks=4), 32, True, stay
        )

    def test_blocks_that_share_more_than_hidden_states_stay_together(self):
        model = tiny_model()
        first, second = model.model.layers

        def lend(module, args, kwargs):
            return args, kwargs | {"from_before": lent[0]}

        lent = []
        first.register_forward_hook(lambda module, args, output: lent.append(output * 2))
        second.register_forward_pre_hook(lend, with_kwargs=True)
        drawn = outline(model, 16, True, stay)
        assert drawn.blocks == () and drawn.after > 0

    def test_code_that_needs_data_gives_an_empty_outline_and_a_warning(self, caplog):
        model = tiny_model()
        model.model.norm.register_forward_hook(lambda module, args, output: output * output.sum().item())
        assert not outline(model, 16, True, stay).blocks
        assert "cannot be foretold" in caplog.text


def test_hidden_states_that_do_not_fit_are_refused(monkeypatch):
    model, config = tiny_model(blocks=4), GuidedQuantConfig(bits=2, device="cpu")
    footprint = Footprint(model, plan_layers(model, config).layers, outline(model, 33, True, stay), stay)
    config.max_memory = memory_for(model, config)
    assert len(divide(footprint, config, rows=8)) == 4
    with pytest.raises(ModelError, match=r"Between 4 segments, hidden states of \d+ rows .* Lower num_samples"):
        divide(footprint, config, rows=10**12)


def test_layers_that_read_the_same_share_a_hessian_without_gradients(rows):
    model, config = tiny_model(), GuidedQuantConfig(bits=2, dataset=rows, guided=False)
    drawn = outline(model, rows[0].numel(), False, stay)
    layer = "model.layers.1."
    assert {name: twin for name, twin in drawn.twins.items() if name.startswith(layer)} == {
        f"{layer}self_attn.k_proj": f"{layer}self_attn.q_proj",
        f"{layer}self_attn.v_proj": f"{layer}self_attn.q_proj",
        f"{layer}mlp.up_proj": f"{layer}mlp.gate_proj",
    }
    layers = plan_layers(model, config).layers
    guided = outline(model, rows[0].numel(), True, stay)
    assert guided.twins == drawn.twins
    planned = {layer.name: layer for layer in layers}
    assert sum(has_twin(layer, planned, drawn) for layer in layers) == 6
    assert not any(has_twin(layer, planned, guided) for layer in layers)
    # To train codebooks takes what layers read, once, whichever of those that read it are trained.
    grown = []
    for some in (layers, [layer for layer in layers if "q_proj" not in layer.name]):
        one, two = (Footprint(model, some, guided, stay).distillation(n, 4, 1, 0, (None, None)) for n in (1, 2))
        grown.append(two[torch.device("cpu")] - one[torch.device("cpu")])
    assert grown[0] == grown[1]
    footprint = Footprint(model, layers, drawn, stay)
    relay = Relay(model, drawn, [(0, 2)], rows, guided=False)
    found = gather_segment(model, relay, 0, layers, config)
    assert len({id(statistics) for statistics in found.values()}) == 8
    distinct = {id(statistics): statistics.hessian.nbytes for statistics in found.values()}
    assert footprint.hessians(0, 2)[torch.device("cpu")] == sum(distinct.values())
    everything = gather(model, rows, [(0, 2)], guided=False)
    for name, statistics in found.items():
        # Two groups there, which are equal without gradients.
        assert torch.equal(statistics.hessian[0], everything[name][1]), name


@pytest.mark.parametrize("guided", [True, False])
def test_a_model_without_decoder_blocks_of_its_own_is_quantized_in_one_piece(rows, guided, monkeypatch):
    """Code of a model that knows nothing of transformers' layer class."""
    plain, odd = (tiny_model("llama") for _ in range(2))
    config = GuidedQuantConfig(bits=2, guided=guided, dataset=rows)
    hf_guidedquant.quantize(plain, config)
    monkeypatch.setitem(outline.__globals__, "GradientCheckpointingLayer", type("Nothing", (), {}))
    assert not outline(odd, rows[0].numel(), guided, stay).blocks
    hf_guidedquant.quantize(odd, GuidedQuantConfig(bits=2, guided=guided, dataset=rows))
    for (name, one), other in zip(plain.state_dict().items(), odd.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("guided", [True, False])
def test_the_blocks_work_is_told_apart_from_the_heads(guided):
    model, tokens = tiny_model("llama", blocks=4), 33
    drawn = outline(model, tokens, guided, stay)
    head = model.lm_head.weight.numel()
    weights = sum(module.weight.numel() for module in linears(model).values())
    products = 2 * tokens * weights * (2 if guided else 1)
    # Two products of queries, keys and values forward, five backward, in each block.
    attention = 4 * (14 if guided else 4) * 4 * tokens * tokens * 16
    assert sum(operation.flops for operation in drawn.block_work) == products + attention
    assert sum(operation.flops for operation in drawn.work) == products + attention + 2 * tokens * head * (1 + guided)
