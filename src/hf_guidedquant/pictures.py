"""Pictures of a quantized model, as figures of matplotlib (the extra ``pictures``)."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .calibration.collector import end_loss, gradients_of_activations_only, input_device
from .errors import EvaluationError, HessianError, PackageMissingError
from .linears import is_linear, linear_shape
from .report import Report, load_report
from .running import checkpointed, evaluating

# Quantile of the entries' sizes at which the colours of a Fisher matrix end: a few are far larger than all others.
_FISHER_QUANTILE = 0.99


def objective_map(source: Report | str | os.PathLike) -> Any:
    """Heat maps of the layers' objectives over block and module: of the solver's first stage, and of its last.

    Args:
        source: A model's ``quantization_report``, or the folder of a saved model.

    Returns:
        A ``matplotlib.figure.Figure``; ``figure.savefig("objectives.png")`` writes it.

    Raises:
        PackageMissingError: matplotlib is not installed.
        CheckpointError: The folder holds no report.
    """
    figure = _figure()
    modules, blocks, stages = objectives(source)
    names = list(stages)
    # One stage, where there are no more.
    ends = dict.fromkeys((names[0], names[-1]))
    finite = torch.cat([stages[name][~stages[name].isnan()] for name in ends])
    limits = {"vmin": float(finite.min()), "vmax": float(finite.max())}
    panels = figure.subplots(1, len(ends), sharey=True, squeeze=False)[0]
    for panel, name in zip(panels, ends, strict=True):
        image = panel.imshow(stages[name].numpy(), aspect="auto", **limits)
        panel.set_title(f"relative objective: {name}")
        panel.set_xticks(range(len(modules)), modules, rotation=45, ha="right")
        panel.set_yticks(range(len(blocks)), blocks)
    panels[0].set_ylabel("block")
    figure.colorbar(image, ax=list(panels))
    return figure


def perplexity_curves(
    measured: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], original: Mapping[str, float] | None = None
) -> Any:
    """Perplexity, on a logarithmic scale, against bits per weight: a panel per text.

    Args:
        measured: Text -> what is to be compared, a method or a model -> its points: bits per weight, perplexity.
        original: Text -> perplexity of the original, a dotted line.

    Returns:
        A ``matplotlib.figure.Figure``.

    Raises:
        PackageMissingError: matplotlib is not installed.
    """
    figure = _figure(figsize=(6.5 * len(measured), 4.5))
    from matplotlib.ticker import LogFormatter

    panels = figure.subplots(1, len(measured), squeeze=False)[0]
    for panel, (text, curves) in zip(panels, measured.items(), strict=True):
        for name, points in curves.items():
            panel.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
        if original is not None:
            panel.axhline(original[text], color="black", linestyle=":", label="full precision")
        panel.set(yscale="log", xlabel="bits per weight", ylabel="perplexity", title=text)
        panel.yaxis.set(major_formatter=LogFormatter(), minor_formatter=LogFormatter())
        panel.legend()
    return figure


def check_picture(file: str | os.PathLike) -> None:
    """Refuse, before anything takes time, a file that no picture can be written to.

    Raises:
        PackageMissingError: matplotlib is not installed.
        EvaluationError: It has no folder, or its ending is of no kind of picture.
    """
    path, kinds = Path(file), _figure().canvas.get_supported_filetypes()
    if path.suffix.removeprefix(".") not in kinds or not path.absolute().parent.is_dir():
        raise EvaluationError(f"{path} cannot be written: it must lie in a folder, and end with .{', .'.join(kinds)}.")


def row_histogram(weight: Tensor, codebook: Tensor, bins: int = 100) -> Any:
    """Histogram of a row of weights, with its codebook as lines on top.

    Args:
        weight: The original's weights of an output channel, ``[in]``.
        codebook: Its values, ``[2^bits]``: a row of a quantized layer's ``lut``.
        bins: Bars of the histogram.

    Returns:
        A ``matplotlib.figure.Figure``.

    Raises:
        PackageMissingError: matplotlib is not installed.
    """
    figure = _figure()
    panel = figure.subplots()
    panel.hist(weight.detach().float().cpu().numpy(), bins=bins)
    for value in codebook.detach().float().cpu().tolist():
        panel.axvline(value, color="black", linewidth=1)
    panel.set_xlabel("weight")
    panel.set_ylabel("count")
    return figure


def fisher_map(
    model: Any,
    layer: str,
    rows: Sequence[Tensor],
    outputs: tuple[int, int] = (0, 1),
    inputs: int = 64,
    num_groups: int = 1,
) -> Any:
    """The Fisher matrix of two output channels' weights, beside what the guided objective makes of it.

    The matrices are those of :func:`fisher_blocks`, in one scale of colours that ends where 1 % of the left one's
    entries are larger. What is kept are the interactions inside a channel, as its group's Hessian has them; those
    between channels, the off-diagonal blocks, are dropped.

    Args:
        model, layer, rows, outputs, inputs, num_groups: See :func:`fisher_blocks`.

    Returns:
        A ``matplotlib.figure.Figure``.

    Raises:
        PackageMissingError: matplotlib is not installed.
        EvaluationError: As :func:`fisher_blocks`.
        HessianError: As :func:`fisher_blocks`.
    """
    figure = _figure(figsize=(9, 4.5))
    fisher, approximation = fisher_blocks(model, layer, rows, outputs, inputs, num_groups)
    limit = float(fisher.abs().flatten().quantile(_FISHER_QUANTILE)) or float(fisher.abs().max())
    size = fisher.shape[0] // 2
    panels = figure.subplots(1, 2, sharey=True)
    for panel, matrix, title in zip(panels, (fisher, approximation), ("Fisher", "guided Hessian"), strict=True):
        image = panel.imshow(matrix.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
        panel.set_title(title)
        panel.axhline(size - 0.5, color="black", linewidth=0.5)
        panel.axvline(size - 0.5, color="black", linewidth=0.5)
        centres = [(size - 1) / 2, size + (size - 1) / 2]
        panel.set_xticks(centres, [f"channel {output}" for output in outputs])
        panel.set_yticks(centres, [f"channel {output}" for output in outputs], rotation=90, va="center")
    figure.suptitle(f"{layer}, first {size} inputs")
    figure.colorbar(image, ax=list(panels), shrink=0.7, extend="both")
    return figure


def fisher_blocks(
    model: Any,
    layer: str,
    rows: Sequence[Tensor],
    outputs: tuple[int, int] = (0, 1),
    inputs: int = 64,
    num_groups: int = 1,
) -> tuple[Tensor, Tensor]:
    """Empirical Fisher matrix of two output channels' weights, and its approximation by their groups' Hessians.

    With inputs ``x_t``, outputs ``z_t`` and the end loss ``l``, a token's gradient of channel ``j``'s weights is
    ``g_tj = (dl/dz_tj) x_t``. Block ``(i, j)`` of the Fisher matrix is the sum over tokens of ``g_ti g_tjᵀ``. In the
    approximation (Kim et al. 2025) a diagonal block is the Hessian of the channel's group, in which ``(dl/dz_tj)²``
    is the group's mean, and the other blocks are zero.

    Args:
        model: The original, a causal language model on any devices.
        layer: Name of a linear layer in it.
        rows: Token ids, int64 ``[T]`` each.
        outputs: Two output channels.
        inputs: Inputs to look at, from the first: ``K``; the layer's number of inputs at most.
        num_groups: Groups of output channels that share a Hessian.

    Returns:
        Both matrices, float64 ``[2 K, 2 K]`` on the CPU; the weights of the first channel come first.

    Raises:
        EvaluationError: There is no such linear layer, it has no such channels, or there are no rows.
        HessianError: Activations or gradients are NaN or infinite.
        ModelError: The model gives no logits.
    """
    module = _linear(model, layer)
    count, width = linear_shape(module)[0], min(inputs, linear_shape(module)[1])
    if len(set(outputs)) != 2 or not all(0 <= output < count for output in outputs) or width < 1 or not len(rows):
        raise EvaluationError(
            f"{layer} has {count} output channels and needs two different ones, an input and a row of tokens at least; "
            f"got outputs={outputs}, inputs={inputs} and {len(rows)} rows."
        )
    size = -(-count // num_groups)
    starts = [output // size * size for output in outputs]
    fisher = torch.zeros(2 * width, 2 * width, dtype=torch.float64)
    hessians = torch.zeros(2, width, width, dtype=torch.float64)

    def add(x: Tensor, grad: Tensor) -> None:
        x, grad = x.flatten(0, -2)[:, :width].double().cpu(), grad.flatten(0, -2)
        slopes = grad[:, list(outputs)].double().cpu()
        gradients = torch.cat([slopes[:, :1] * x, slopes[:, 1:] * x], dim=-1)  # [T, 2 K]
        fisher.add_(gradients.T @ gradients)
        for hessian, start in zip(hessians, starts, strict=True):
            saliency = grad[:, start : start + size].double().square().mean(dim=-1, keepdim=True).cpu()
            hessian.add_((saliency * x).T @ x)

    def watch(_: nn.Module, args: tuple, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda grad: add(args[0].detach(), grad))

    hook = module.register_forward_hook(watch)
    try:
        with torch.enable_grad(), evaluating(model), gradients_of_activations_only(model), checkpointed(model):
            for row in rows:
                ids = row.unsqueeze(0).to(input_device(model))
                end_loss(model(input_ids=ids, use_cache=False), row).backward()
    finally:
        hook.remove()
    if not torch.isfinite(fisher).all() or not torch.isfinite(hessians).all():
        raise HessianError(layer, "NaN or infinite entries", "Load the model in bfloat16 or float32.")
    return fisher, torch.block_diag(*hessians)


def _linear(model: Any, name: str) -> nn.Module:
    module = dict(model.named_modules()).get(name)
    if module is None or not is_linear(module):
        raise EvaluationError(
            f"{name!r:.200} is no linear layer of this {type(model).__name__}. Load the full-precision original, and "
            "take a name from hf_guidedquant.plan(model, config).layers."
        )
    return module


def objectives(source: Report | str | os.PathLike) -> tuple[list[str], list[str], dict[str, Tensor]]:
    """Modules, blocks and, per stage, the objectives float64 ``[blocks, modules]``; NaN where there is no such layer.

    Raises:
        CheckpointError: The folder holds no report.
    """
    report = source if isinstance(source, Report) else load_report(source)
    cells = {
        (stage, *place_of(layer.plan.name)): value
        for layer in report.layers
        for stage, value in layer.objectives.items()
    }
    stages, blocks, modules = ([*dict.fromkeys(key[i] for key in cells)] for i in range(3))
    table = {
        stage: torch.tensor(
            [[cells.get((stage, block, module), float("nan")) for module in modules] for block in blocks],
            dtype=torch.float64,
        )
        for stage in stages
    }
    return modules, blocks, table


def place_of(name: str) -> tuple[str, str]:
    """Block and module of a layer: ``model.layers.3.mlp.up_proj`` is ``mlp.up_proj`` in block 3."""
    found = re.search(r"\.(\d+)\.(.+)", name)
    return (found[1], found[2]) if found else ("", name)


def _figure(**options: Any) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PackageMissingError("matplotlib", "pictures") from error
    return Figure(layout="constrained", **options)
