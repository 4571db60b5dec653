"""Hessians and saliencies against float64 autograd, and everything that must not change them."""

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_model, token_rows

from hf_guidedquant.calibration import LayerStatistics, Outline, Relay, collector, gram
from hf_guidedquant.calibration.collector import token_weights
from hf_guidedquant.errors import CalibrationError, ModelError
from hf_guidedquant.linears import dense_weight, is_linear

EPS32 = torch.finfo(torch.float32).eps


def linears(model):
    head = model.get_output_embeddings()
    return {name: module for name, module in model.named_modules() if is_linear(module) and module is not head}


def gather(model, rows, **options):
    """The Hessians of all layers."""
    return {name: layer.hessian for name, layer in gather_statistics(model, rows, **options).items()}


def gather_statistics(model, rows, groups=3, guided=True, diagonal=False, labels=None, curvature=False):
    statistics = {}
    for name, module in linears(model).items():
        outputs, inputs = dense_weight(module).shape
        shape = (groups, inputs) if diagonal else (groups, inputs, inputs)
        statistics[name] = LayerStatistics.empty(
            shape, torch.device("cpu"), curvature_shape=(outputs, outputs) if curvature else None
        )
    Relay(model, Outline(), [(0, 0)], rows, guided=guided, labels=labels).collect(0, statistics)
    return statistics


def reference(model, rows, groups, guided, counts=None, curvature=False):
    """Float64, straight from the definition: loss gradients of every layer's output by autograd.

    ``counts`` is 1 for every token of every row whose loss counts, 0 for the others. With ``curvature`` it is that of
    the outputs which is returned, not the Hessians.
    """
    model = model.double()
    seen = {}

    def keep(name):
        def hook(module, args, output):
            seen[name] = (args[0], output)

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in linears(model).items()]
    hessians = {}
    for row, count in zip(rows, counts or map(torch.ones_like, rows), strict=True):
        logits = model(input_ids=row[None], use_cache=False).logits[0]
        losses = -logits[:-1].log_softmax(-1)[range(len(row) - 1), row[1:]]
        loss = (losses * count[1:]).sum()
        outputs = [output for _, output in seen.values()]
        for (name, (x, output)), grad in zip(seen.items(), torch.autograd.grad(loss, outputs), strict=True):
            size = -(-output.shape[-1] // groups)
            parts = [part.square().mean(-1)[0] for part in grad.split(size, dim=-1)]
            if not guided:
                parts = [torch.ones_like(part) for part in parts]
            found = torch.stack([torch.einsum("t,ti,tj->ij", s, x[0], x[0]) for s in parts])
            if curvature:
                found = torch.einsum("ti,tj->ij", grad[0], grad[0])
            hessians[name] = hessians.get(name, 0) + found.detach()
    for handle in handles:
        handle.remove()
    return hessians


@pytest.mark.parametrize("guided", [True, False])
def test_hessians_equal_float64_autograd(any_model, rows, guided):
    found = gather(any_model, rows, guided=guided)
    for name, expected in reference(any_model, rows, 3, guided).items():
        # Gradients pass some 40 fp32 operations each way, each of relative error eps times at most sqrt(96) terms.
        bound = 40 * 96**0.5 * EPS32 * expected.abs().amax()
        assert expected.abs().amax() > 0
        assert (found[name] - expected).abs().amax() <= bound, name


def test_curvatures_equal_float64_autograd_and_change_no_hessian(any_model, rows):
    found, plain = gather_statistics(any_model, rows, curvature=True), gather(any_model, rows)
    for name, expected in reference(any_model, rows, 3, True, curvature=True).items():
        bound = 40 * 96**0.5 * EPS32 * expected.abs().amax()
        assert expected.abs().amax() > 0
        assert (found[name].curvature - expected).abs().amax() <= bound, name
        assert torch.equal(found[name].curvature, found[name].curvature.mT)
        assert torch.equal(found[name].hessian, plain[name])


def test_hessians_of_a_loss_that_counts_some_tokens_equal_float64_autograd(any_model, rows):
    generator = torch.Generator().manual_seed(1)
    counts = [torch.randint(2, row.shape, generator=generator) for row in rows]
    labels = [row.where(count == 1, -100) for row, count in zip(rows, counts, strict=True)]
    found, plain = gather(any_model, rows, labels=labels), gather(any_model, rows)
    for name, expected in reference(any_model, rows, 3, True, counts).items():
        bound = 40 * 96**0.5 * EPS32 * expected.abs().amax()
        assert (found[name] - expected).abs().amax() <= bound < (plain[name] - expected).abs().amax(), name


def test_labels_change_nothing_where_no_loss_is_looked_at(llama, rows):
    labels = [torch.full_like(row, -100) for row in rows]
    found, plain = gather(llama, rows, guided=False, labels=labels), gather(llama, rows, guided=False)
    for name, hessian in plain.items():
        assert torch.equal(found[name], hessian), name


def test_diagonals_are_the_hessians_diagonals(llama, rows):
    full, diagonal = gather(llama, rows), gather(llama, rows, diagonal=True)
    for name, hessian in full.items():
        torch.testing.assert_close(
            diagonal[name], hessian.diagonal(dim1=1, dim2=2), rtol=rows[0].numel() * EPS32, atol=0
        )


def test_hessians_add_up_over_rows(llama, rows):
    whole = gather(llama, rows)
    first, second = gather(llama, rows[:3]), gather(llama, rows[3:])
    for name, hessian in whole.items():
        bound = len(rows) * rows[0].numel() * EPS32 * hessian.abs().amax()
        assert (first[name] + second[name] - hessian).abs().amax() <= bound


def test_the_model_is_left_as_it_was(llama, rows):
    llama.train()
    llama.model.layers[0].eval()
    llama.lm_head.weight.requires_grad_(False)
    before = {name: (p.requires_grad, p.grad) for name, p in llama.named_parameters()}
    modes = [module.training for module in llama.modules()]
    with torch.no_grad():
        gather(llama, rows)
    assert {name: (p.requires_grad, p.grad) for name, p in llama.named_parameters()} == before
    assert [module.training for module in llama.modules()] == modes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in llama.modules())


def test_token_weights_with_a_shorter_last_group():
    grad = torch.tensor([[1.0, -2.0, 2.0, 4.0, 3.0]])
    # Of three and of two squares; each is a root, a division and a square of fp32.
    torch.testing.assert_close(token_weights(grad, 2), torch.tensor([[3.0, 12.5]]), rtol=4 * EPS32, atol=0)
    torch.testing.assert_close(token_weights(grad, 1), torch.tensor([[6.8]]), rtol=4 * EPS32, atol=0)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("size", [1, 127, 255, 300, 1000])
def test_gram_matrices_of_groups(size, weighted, monkeypatch):
    """In stripes from 256 inputs on, the groups together below."""
    monkeypatch.setattr(gram, "_STRIPE", 128)
    generator = torch.Generator().manual_seed(size)
    x, weights = torch.randn(40, size, generator=generator), torch.rand(40, 2, generator=generator)
    total, diagonal = torch.zeros(2, size, size), torch.zeros(2, size)
    for part in (slice(0, 25), slice(25, 40)):
        gram.add_grams(total, x[part], weights[part] if weighted else None)
        gram.add_squares(diagonal, x[part], weights[part] if weighted else None)
    gram.mirror(total)
    for group, own in enumerate(weights.double().mT if weighted else torch.ones(2, 40, dtype=torch.float64)):
        expected = (x.double() * own.unsqueeze(-1)).mT @ x.double()
        # 40 sums, and of every term two roots' and three products' rounding.
        bound = 47 * EPS32 * ((x.double().abs() * own.unsqueeze(-1)).mT @ x.double().abs())
        assert torch.equal(total[group], total[group].mT)
        assert ((total[group] - expected).abs() <= bound).all()
        assert ((diagonal[group] - expected.diagonal()).abs() <= bound.diagonal()).all()


def test_the_loss_in_pieces_is_the_loss(monkeypatch):
    monkeypatch.setattr(collector, "_LOSS_TOKENS", 7)
    logits = torch.randn(40, 50, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(50, (40,))
    pieces = collector._cross_entropy(logits, targets)
    whole = F.cross_entropy(logits, targets, reduction="sum")
    # In fp32 at least; what is float64 stays so. 40 terms, in two orders.
    torch.testing.assert_close(pieces, whole, rtol=50 * torch.finfo(torch.float64).eps, atol=0)
    (ours,), (theirs,) = torch.autograd.grad(pieces, logits), torch.autograd.grad(whole, logits)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=50 * EPS32)


def poison(model, name, rows_to_poison):
    """Make a layer's output infinite in the given forward passes."""
    calls = iter(range(10**6))

    def hook(module, args, output):
        return output * float("inf") if next(calls) in rows_to_poison else output

    return model.get_submodule(name).register_forward_hook(hook)


@pytest.mark.parametrize("guided", [True, False])
def test_bad_rows_are_left_out_and_counted(guided):
    model, rows = tiny_model(), token_rows(20)
    good = gather(model, rows[1:], guided=guided)
    handle = poison(model, "model.layers.1.mlp.up_proj", {0})
    found = gather(model, rows, guided=guided)
    handle.remove()
    name = "model.layers.1.mlp.down_proj"
    assert torch.isfinite(found[name]).all()
    assert torch.equal(found[name], good[name])


def test_a_bad_row_is_left_out_of_hessian_and_curvature_alike():
    model, rows = tiny_model(), token_rows(20)
    good = gather_statistics(model, rows[1:], curvature=True)
    handle = poison(model, "model.layers.1.mlp.up_proj", {0})
    found = gather_statistics(model, rows, curvature=True)
    handle.remove()
    for name, statistics in found.items():
        assert int(statistics.bad_rows) == 1
        assert torch.equal(statistics.hessian, good[name].hessian), name
        assert torch.equal(statistics.curvature, good[name].curvature), name


def test_a_row_without_a_finite_loss_counts_for_every_layer():
    model = tiny_model()
    poison(model, "model.layers.1.mlp.up_proj", {0})
    found = gather_statistics(model, token_rows(20))
    assert {int(layer.bad_rows) for layer in found.values()} == {1}


def test_too_many_bad_rows_abort(rows):
    model = tiny_model()
    poison(model, "model.layers.1.mlp.up_proj", {0, 1})
    with pytest.raises(CalibrationError, match="2 of 8 calibration rows gave NaN or infinity"):
        gather(model, rows)


def test_overflow_in_the_backward_pass_is_found_with_the_layers_name(rows):
    model = tiny_model()
    layer = model.get_submodule("model.layers.0.mlp.down_proj")
    layer.register_forward_hook(lambda m, a, out: out.register_hook(lambda grad: grad * float("inf")) and None)
    with pytest.raises(CalibrationError, match=r"in model\.layers\.0"):
        gather(model, rows)


def test_a_model_without_logits_is_refused_when_guided(llama, rows):
    with pytest.raises(ModelError, match="no logits for every token"):
        gather(_Body(llama.model), rows)


class _Body(torch.nn.Module):
    """A model without a head."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    def get_input_embeddings(self):
        return self.body.get_input_embeddings()

    def get_output_embeddings(self):
        return None

    def forward(self, **kwargs):
        return self.body(**kwargs)
