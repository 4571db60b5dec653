"""Conditioning of Hessians: whatever calibration leaves, solvers get something finite, symmetric and factorisable."""

import pytest
import torch

from hf_guidedquant.errors import HessianError
from hf_guidedquant.solvers.hessian import _power_of_two, condition

EPS = torch.finfo(torch.float32).eps


def gram(groups: int, inputs: int, tokens: int, seed: int = 0) -> torch.Tensor:
    """``[groups, inputs, inputs]`` of rank min(inputs, tokens), exactly symmetric."""
    x = torch.randn(groups, tokens, inputs, generator=torch.Generator().manual_seed(seed))
    product = x.mT @ x
    return (product + product.mT) / 2


def factorises(hessian: torch.Tensor) -> bool:
    return bool((torch.linalg.cholesky_ex(hessian)[1] == 0).all())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", [(0, 0, 0), (1, 2, 3)])
def test_nan_and_inf_are_refused_and_the_layer_is_named(value, where):
    hessian = gram(2, 5, 20)
    hessian[where] = value
    with pytest.raises(HessianError, match=r"model\.layers\.3\.mlp\.down_proj") as caught:
        condition(hessian, "model.layers.3.mlp.down_proj")
    assert caught.value.layer == "model.layers.3.mlp.down_proj"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_in_a_diagonal_are_refused(value):
    with pytest.raises(HessianError, match="q_proj"):
        condition(torch.tensor([[1.0, value, 2.0]]), "q_proj")


def test_asymmetric_input_becomes_the_mean_of_itself_and_its_transpose():
    hessian = gram(2, 6, 40)
    skew = torch.randn(hessian.shape, generator=torch.Generator().manual_seed(1))
    skew = skew - skew.mT
    result, _ = condition(hessian + skew, "layer")
    expected, _ = condition(hessian, "layer")
    assert torch.equal(result, result.mT)
    # Adding and cancelling the skew part rounds each entry a few times at the size of the entry and of the skew.
    size = (hessian.abs() + skew.abs()) / hessian.diagonal(dim1=-2, dim2=-1).mean(dim=-1).view(-1, 1, 1)
    assert ((result - expected).abs() <= 8 * EPS * size).all()


def test_a_good_hessian_is_only_rescaled():
    hessian = gram(3, 7, 50)
    before = hessian.clone()
    result, note = condition(hessian, "layer")
    assert torch.equal(hessian, before)
    assert (note.dead_inputs, note.damping, note.fallback) == (0, 0.0, None)
    scale = hessian.double().diagonal(dim1=-2, dim2=-1).mean(dim=-1)
    # A mean of 7 rounds at most 7 times.
    assert ((note.scale - scale).abs() <= 7 * EPS * scale).all()
    # The scale's error above, and the division itself.
    assert ((result - hessian / scale.view(-1, 1, 1)).abs() <= 9 * EPS * result.abs()).all()


@pytest.mark.parametrize("shape", [(2, 5, 5), (2, 5)])
def test_all_zero_statistics_fall_back_and_say_so(shape):
    result, note = condition(torch.zeros(shape), "layer")
    expected = torch.eye(5).expand(2, 5, 5) if len(shape) == 3 else torch.ones(2, 5)
    assert torch.equal(result, expected)
    assert note.fallback
    assert note.dead_inputs == 10
    assert torch.equal(note.scale, torch.zeros(2))


def test_dead_inputs_get_the_mean_importance_and_are_counted():
    hessian = gram(2, 6, 40)
    for group, dead in ((0, 1), (0, 4), (1, 5)):
        hessian[group, dead, :] = 0
        hessian[group, :, dead] = 0
    result, note = condition(hessian, "layer")
    assert note.dead_inputs == 3
    assert note.fallback is None
    assert factorises(result)
    # In units of the recorded scale, which is the mean diagonal, the mean is 1.
    assert result[0, 1, 1] == result[0, 4, 4] == result[1, 5, 5] == 1
    assert result[0, 1].count_nonzero() == 1
    assert torch.equal(note.scale, hessian.diagonal(dim1=-2, dim2=-1).mean(dim=-1))


def test_dead_inputs_of_a_diagonal_get_the_mean_and_are_counted():
    diagonal = torch.tensor([[4.0, 0.0, 8.0, 0.0], [1.0, 2.0, 3.0, 2.0]])
    result, note = condition(diagonal, "layer")
    assert note.dead_inputs == 2
    assert note.fallback is None
    assert torch.equal(note.scale, torch.tensor([3.0, 2.0]))
    assert torch.equal(result[0, [1, 3]], torch.ones(2))
    # One division, one rounding.
    assert ((result[0, [0, 2]].double() - torch.tensor([4 / 3, 8 / 3]).double()).abs() <= EPS * 8 / 3).all()
    assert torch.equal(result[1], torch.tensor([0.5, 1.0, 1.5, 1.0]))


def test_a_slightly_negative_diagonal_counts_as_dead():
    result, note = condition(torch.tensor([[1.0, -1e-9, 2.0]]), "layer")
    assert note.dead_inputs == 1
    assert (result > 0).all()


def indefinite(inputs: int, lowest: float) -> torch.Tensor:
    """Eigenvalues 1, save one of ``lowest``."""
    basis, _ = torch.linalg.qr(torch.randn(inputs, inputs, generator=torch.Generator().manual_seed(3)).double())
    spectrum = torch.ones(inputs).double()
    spectrum[0] = lowest
    hessian = (basis * spectrum) @ basis.mT
    return ((hessian + hessian.mT) / 2).float().unsqueeze(0)


@pytest.mark.parametrize(
    "hessian",
    [
        pytest.param(gram(1, 12, 1), id="rank-1"),
        pytest.param(gram(1, 12, 5), id="rank-deficient"),
        pytest.param(torch.ones(1, 9, 9), id="identical-inputs"),
        pytest.param(indefinite(16, -1e-3), id="slightly-indefinite"),
        pytest.param(indefinite(16, -1e-5), id="barely-indefinite"),
    ],
)
def test_singular_and_indefinite_hessians_are_damped_until_they_factorise(hessian):
    result, note = condition(hessian, "layer")
    assert note.fallback is None
    assert 0 < note.damping <= 0.1
    assert factorises(result)
    # Nothing but the diagonal moved, by the damping; 1 / scale and the sum each round once, the scale K times.
    plain = hessian / hessian.diagonal(dim1=-2, dim2=-1).mean(dim=-1).view(-1, 1, 1)
    moved = result - plain - note.damping * torch.eye(hessian.shape[-1])
    assert (moved.abs() <= (hessian.shape[-1] + 3) * EPS * (plain.abs() + note.damping)).all()


def test_damping_is_the_least_that_works():
    hessian = indefinite(16, -1e-3)
    result, note = condition(hessian, "layer")
    weaker = result - 0.9 * note.damping * torch.eye(16)
    assert not factorises(weaker)


def test_ill_conditioned_hessian_factorises():
    scales = torch.logspace(-6, 0, 24)
    hessian = gram(1, 24, 200) * scales * scales.unsqueeze(-1)
    result, note = condition(hessian, "layer")
    assert note.fallback is None
    assert factorises(result)


def test_one_bad_group_does_not_damp_the_others():
    good, bad = gram(1, 8, 50), gram(1, 8, 1)
    result, note = condition(torch.cat([good, bad]), "layer")
    assert note.damping > 0
    assert torch.equal(result[:1], condition(good, "layer")[0])


def test_beyond_the_damping_cap_only_the_diagonal_is_left():
    hessian = torch.full((1, 4, 4), -1.0) + 4.0 * torch.eye(4)
    hessian[0, 0, 1] = hessian[0, 1, 0] = 50.0
    result, note = condition(hessian, "layer")
    assert note.fallback
    assert torch.equal(result, torch.diag_embed(result.diagonal(dim1=-2, dim2=-1)))
    assert (result.diagonal(dim1=-2, dim2=-1) > 0).all()


@pytest.mark.parametrize("shape", ["full", "diagonal"])
@pytest.mark.parametrize("tokens", [60, 3])
@pytest.mark.parametrize("exponent", [20, -20, 60, -60])
def test_the_scale_is_recorded_and_leaves_the_solution_alone(shape, tokens, exponent):
    statistics = gram(2, 10, tokens, seed=tokens)
    if shape == "diagonal":
        statistics = statistics.diagonal(dim1=-2, dim2=-1).clone()
    # A power of two changes exponents only, so equality is exact.
    result, note = condition(statistics, "layer")
    scaled, scaled_note = condition(statistics * 2.0**exponent, "layer")
    assert torch.equal(result, scaled)
    assert torch.equal(note.scale * 2.0**exponent, scaled_note.scale)
    assert (note.damping, note.dead_inputs, note.fallback) == (
        scaled_note.damping,
        scaled_note.dead_inputs,
        scaled_note.fallback,
    )


# finite entries near the top of fp32. Every input then counts as dead or the result is NaN, and no error is raised.
def test_finite_statistics_near_the_top_of_fp32_are_used_or_refused_by_name():
    statistics = gram(1, 8, 50)
    top = statistics * (2.0**127 / statistics.abs().max())
    try:
        result, note = condition(top, "o_proj")
    except HessianError as error:
        assert "o_proj" in str(error)
        return
    assert torch.isfinite(note.scale).all()
    assert note.dead_inputs == 0
    # Two roundings in scaling up, and two more in the normalisation of each.
    bound = 6 * torch.finfo(torch.float32).eps * result.abs().amax()
    assert (result - condition(statistics, "o_proj")[0]).abs().amax() <= bound


def test_a_group_of_zeros_leaves_the_other_groups_their_hessian():
    good = gram(1, 6, 40)
    result, note = condition(torch.cat([good, torch.zeros(1, 6, 6)]), "layer")
    assert note.fallback
    assert torch.equal(result[1], torch.eye(6))
    assert torch.equal(result[:1], condition(good, "layer")[0])


@pytest.mark.parametrize("exponent", [-126, -60, 0, 1, 127])
def test_peaks_are_powers_of_two_not_above(exponent):
    found = _power_of_two(torch.tensor([1.0, 1.5, 2 - 2 * EPS]) * 2.0**exponent)
    assert torch.equal(found, torch.full((3,), 2.0**exponent))
    assert torch.equal(_power_of_two(torch.tensor([0.0, 2.0**-140])), torch.full((2,), 2.0**-126))


@pytest.mark.gpu
def test_peaks_on_a_gpu_that_is_not_the_current_one_are_waited_for():
    """They must be computed behind what that GPU is busy with."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    there = torch.rand(3, device="cuda:1")
    expected = _power_of_two(there)
    for _ in range(3):
        late = torch.full_like(there, 100.0)
        torch.cuda.synchronize(1)
        with torch.cuda.device(1):
            torch.cuda._sleep(100_000_000)
        late.copy_(there)
        assert torch.equal(_power_of_two(late), expected)
