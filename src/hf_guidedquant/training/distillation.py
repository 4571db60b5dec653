"""Codebooks trained end to end: the quantized model learns the token distribution of the original.

Codes stay where the solver put them, so files and speed are the same. What is minimised is the mean over tokens of
KL(original ‖ quantized).
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.logging import tqdm

from ..calibration.collector import input_device
from ..config import DistillSpec
from ..linears import stored_weight, vocabulary_layers
from ..nn import TrainedLinear, quantized_modules, replace_module, spacing
from ..replay import worth_graphs
from ..running import (
    checkpointed,
    evaluating,
    mixed_precision,
    repeatable_backward,
    rows_of_their_own,
)
from ..workers import Workers
from .batches import batches, rate, set_aside, shuffled, stacks
from .blocks import Layers
from .divergence import Divergence
from .steps import Steps

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DistillReport:
    """What training did, as KL(original ‖ quantized) in nats per token.

    Attributes:
        trained: Of the rows trained on, a mean over each epoch, while it trained.
        held_back: Of the rows not trained on, before the first and after every epoch.
        best_epoch: The epoch whose codebooks were kept; 0 if none was better than the solver's.
        held_back_rows: Number of rows not trained on.
    """

    trained: tuple[float, ...]
    held_back: tuple[float, ...]
    best_epoch: int
    held_back_rows: int

    def describe(self) -> str:
        """One line for readers."""
        solved, kept = self.held_back[0], self.held_back[self.best_epoch]
        if not self.best_epoch:
            return (
                f"KL to the original {solved:.4f} nats per token on {self.held_back_rows} rows held back; none of "
                f"{len(self.trained)} epochs was better than that, a smaller learning_rate may be"
            )
        return (
            f"KL to the original {solved:.4f} -> {kept:.4f} nats per token on {self.held_back_rows} rows held back "
            f"(epoch {self.best_epoch} of {len(self.trained)})"
        )


@dataclass(frozen=True)
class DistilledEpochs:
    """A distillation after some of its epochs: all that those behind them depend on.

    Attributes:
        trained, held_back, best_epoch: As in :class:`DistillReport`, so far.
        layers: Of every layer, by name: its ``codebook`` as it is now and the ``best`` so far, fp32 ``[N, L]``, and
            what AdamW remembers of it: ``step`` (a scalar), ``exp_avg`` and ``exp_avg_sq``.
    """

    trained: tuple[float, ...]
    held_back: tuple[float, ...]
    best_epoch: int
    layers: Layers

    def fits(self, codebooks: Mapping[str, Tensor], epochs: int) -> bool:
        """Whether they are of these codebooks, and of a distillation of so many epochs."""
        shapes = {
            name: {"codebook": c.shape, "best": c.shape, "step": (), "exp_avg": c.shape, "exp_avg_sq": c.shape}
            for name, c in codebooks.items()
        }
        return (
            len(self.trained) in range(1, epochs + 1)
            and len(self.held_back) == len(self.trained) + 1
            and self.best_epoch in range(len(self.held_back))
            and {name: {key: t.shape for key, t in kept.items()} for name, kept in self.layers.items()} == shapes
        )


def distill(
    model: PreTrainedModel,
    rows: Sequence[Tensor],
    states: Sequence[Tensor],
    spec: DistillSpec,
    seed: int = 0,
    workers: Workers | None = None,
    head: nn.Module | None = None,
    done: DistilledEpochs | None = None,
    keep: Callable[[DistilledEpochs], object] | None = None,
) -> DistillReport:
    """Train the codebooks of a quantized model, in place, and keep those of the best epoch, the start included.

    The steps are AdamW's, relative to a layer's mean distance between neighbouring codewords. Codebooks end in
    ascending order, with the codes renumbered to match. Several processes all do the same work, and end with the first
    one's codebooks.

    Args:
        model: Holds :class:`GuidedLinear` layers; they are replaced by new ones.
        rows: Token ids, int64 ``[T]`` each.
        states: The original's (:func:`hf_guidedquant.divergence.teacher_states`) of the same rows, two at least. Rows
            with NaN or infinity are left out.
        spec: How to train.
        seed: Of the order of the rows, and of the choice of those held back.
        workers: Processes that quantize together.
        head: The original's output head, if that of ``model`` is quantized. Neither it nor embeddings are trained.
        done: Epochs that are behind, from all of the above.
        keep: Called after every other epoch.
    """
    workers = workers or Workers()
    generator = torch.Generator().manual_seed(seed)
    device = input_device(model)
    if head is not None:
        head = head.to(stored_weight(model.get_output_embeddings()).device)
    divergence = Divergence(model, rows, states, head)
    training, held_back = set_aside(divergence.usable(), spec.held_back, generator)
    with ExitStack() as stack:
        codebooks = stack.enter_context(_trained_codebooks(model))
        for context in (evaluating(model), checkpointed(model), mixed_precision(device), rows_of_their_own()):
            stack.enter_context(context)
        parameters = list(codebooks.values())
        steps = Steps(
            divergence.summed, _groups(parameters, spec.learning_rate), clip=1.0, graphs=worth_graphs(model, device)
        )
        stack.enter_context(repeatable_backward(device, lambda: steps.try_out(*divergence.of(training[:1]))))
        if done is not None and not done.fits(codebooks, spec.epochs):
            logger.warning("What was kept of distillation is not of this model; it begins anew.")
            done = None
        if done is None:
            trained, found, best_epoch = [], [divergence.mean(held_back)], 0
            best = _copy(parameters)
        else:
            trained, found, best_epoch = [*done.trained], [*done.held_back], done.best_epoch
            best = _restore(codebooks, steps, done.layers)
        each = divergence.tokens(training)
        total = spec.epochs * each
        with tqdm(initial=len(trained) * each, total=total, desc="Distilling", unit="token", unit_scale=True) as bar:
            for epoch in range(1, spec.epochs + 1):
                # The order is drawn of the epochs that are behind, too.
                order = shuffled(training, generator)
                if epoch <= len(trained):
                    continue
                behind = (epoch - 1) * each
                for batch in batches(rows, order, spec.batch_tokens):
                    tokens = divergence.tokens(batch)
                    for together in stacks(rows, batch):
                        steps.add(*divergence.of(together))
                    steps.step(rate((behind + tokens / 2) / total), tokens)
                    behind += tokens
                    bar.update(tokens)
                trained.append(steps.total() / each)
                found.append(divergence.mean(held_back))
                logger.info("Distilled epoch %d: KL %.4f, held back %.4f", epoch, trained[-1], found[-1])
                if found[-1] < found[best_epoch]:
                    best, best_epoch = _copy(parameters), epoch
                if keep is not None:
                    layers = _kept(codebooks, best, steps)
                    keep(DistilledEpochs(tuple(trained), tuple(found), best_epoch, layers))
        if problem := steps.left_out():
            logger.warning("Distilling: %s.", problem)
        for codebook, values in zip(parameters, best, strict=True):
            workers.hand_over(values, 0)
            codebook.data.copy_(values)
    return workers.tell(DistillReport(tuple(trained), tuple(found), best_epoch, len(held_back)), 0)


@contextmanager
def _trained_codebooks(model: nn.Module) -> Iterator[dict[str, nn.Parameter]]:
    """A model's codebooks, by layer, as its only parameters with gradients; it keeps what they are at the end.

    After an exception the model is as it was.
    """
    frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    vocabulary = vocabulary_layers(model)
    finished: dict[str, Any] = {name: m for name, m in quantized_modules(model).items() if name not in vocabulary}
    layers = {name: TrainedLinear(layer) for name, layer in finished.items()}
    try:
        for parameter in frozen:
            parameter.requires_grad_(False)
        for name, layer in layers.items():
            replace_module(model, name, layer)
        yield {name: layer.codebook for name, layer in layers.items()}
        finished = {name: layer.quantized() for name, layer in layers.items()}
    finally:
        for name, module in finished.items():
            replace_module(model, name, module)
        for parameter in frozen:
            parameter.requires_grad_(True)


def _groups(codebooks: Sequence[nn.Parameter], learning_rate: float) -> list[dict[str, Any]]:
    """A group per layer, with its largest step."""
    return [{"params": [codebook], "largest": learning_rate * spacing(codebook)} for codebook in codebooks]


def _copy(codebooks: Sequence[nn.Parameter]) -> list[Tensor]:
    return [codebook.detach().clone() for codebook in codebooks]


def _kept(codebooks: Mapping[str, Tensor], best: Sequence[Tensor], steps: Steps) -> Layers:
    """What :class:`DistilledEpochs` has of every layer."""
    parts = zip(codebooks.items(), best, steps.state(), strict=True)
    return {name: {"codebook": codebook.detach(), "best": chosen, **state} for (name, codebook), chosen, state in parts}


def _restore(codebooks: Mapping[str, nn.Parameter], steps: Steps, layers: Layers) -> list[Tensor]:
    """Put the codebooks, and what AdamW remembers, back to what they were; returns the best ones."""
    kept = [layers[name] for name in codebooks]
    for codebook, own in zip(codebooks.values(), kept, strict=True):
        codebook.data.copy_(own["codebook"])
    steps.restore([{name: own[name] for name in ("step", "exp_avg", "exp_avg_sq")} for own in kept])
    return [own["best"].to(codebook.device) for codebook, own in zip(codebooks.values(), kept, strict=True)]


__all__ = ["DistillReport", "DistilledEpochs", "distill"]
