"""Decoder blocks trained one after the other: their layers learn to give what the original block gives.

Layer-wise solutions do not know what their neighbours have lost. Here every block reads what the quantized blocks
before it give, and its quantized layers are trained until it gives what the original gives, as near as can be: the
loss is the squared error of the hidden states that leave it (block-wise reconstruction as in BRECQ, Li et al. 2021,
and EfficientQAT, Chen et al. 2024, here on codebooks). Codebooks are trained, and codes move by straight-through
gradients of latent weights, or stay.
One block's weights are trained at a time, so that it takes little memory whatever the size of the model.
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

from ..calibration import Outline, Passage, Shelf
from ..config import ReconstructSpec
from ..errors import ModelError
from ..linears import dense_weight, vocabulary_layers
from ..nn import GuidedLinear, LatentLinear, TrainedLinear, replace_module, spacing
from ..replay import stacked, worth_graphs
from ..running import mixed_precision, repeatable_backward, rows_of_their_own
from ..triton_kernels import unpack_codes
from ..workers import Workers
from .batches import batches, rate, set_aside, shuffled, stacks
from .blocks import BlockReport, Layers, ReconstructReport, TrainedBlock, layers_by_block
from .steps import Steps

logger = logging.getLogger(__name__)


def check_blocks(model: PreTrainedModel, drawn: Outline) -> None:
    """Refuse a model that cannot be run block by block.

    Raises:
        ModelError: Saying what to do instead.
    """
    if not drawn.blocks:
        raise ModelError(
            f"{type(model).__name__} cannot be run one decoder block at a time, so it cannot be reconstructed. "
            "Use reconstruct=False; distill=True works."
        )


def reconstruct(
    model: PreTrainedModel,
    drawn: Outline,
    rows: Sequence[Tensor],
    layers: Mapping[str, dict[str, Tensor]],
    spec: ReconstructSpec,
    *,
    embeddings: nn.Module | None = None,
    seed: int = 0,
    place: Callable[[torch.device], torch.device] = lambda device: device,
    workers: Workers | None = None,
    done: Sequence[TrainedBlock] = (),
    keep: Callable[[TrainedBlock], object] | None = None,
) -> tuple[Layers, ReconstructReport]:
    """Train solved layers, block by block.

    Args:
        model: The original; it is as it was afterwards.
        drawn: Its decoder blocks.
        rows: Token ids, int64 ``[T]`` each, two at least. Rows whose hidden states are NaN or infinite are left out.
        layers: Tensors of the solved layers, by name. Those outside of the blocks are left as they are.
        spec: How to train.
        embeddings: Quantized ones, from which the quantized blocks will read.
        seed: Of the order of the rows, and of the choice of those held back.
        place: Where the work on weights of a device is done.
        workers: Processes that quantize together; all do the same work, and end with the first one's layers.
        done: Blocks that were trained before, from all of the above: the first ones that have layers, without gaps.
        keep: Called with every other block as soon as it is trained.

    Returns:
        Tensors of the same layers, on the CPU, and what training did.
    """
    workers = workers or Workers()
    passage, shelf = Passage(model, drawn, place), Shelf()
    generator = torch.Generator().manual_seed(seed)
    training, held_back = set_aside(range(len(rows)), spec.held_back, generator)
    # The order of a block's rows must not depend on how many blocks this process has trained before.
    seeds = torch.randint(2**62, (len(drawn.blocks),), generator=generator).tolist()
    own, trained = layers_by_block(drawn, layers), {block.report.name: block for block in done}
    if len(trained) == len(own):
        return _result(layers, own, trained)
    with torch.no_grad(), passage.only(0, 0):
        original = _through(passage, shelf, rows)
    taken = {name: embeddings for name in vocabulary_layers(model)[:1] if name is not None and embeddings is not None}
    with torch.no_grad(), _in_their_places(model, taken), passage.only(0, 0):
        quantized = _through(passage, shelf, rows)
    tokens = spec.epochs * sum(rows[index].numel() for index in training)
    progress = {"initial": len(trained) * tokens, "total": len(own) * tokens}
    with tqdm(**progress, desc="Reconstructing", unit="token", unit_scale=True) as bar:
        for number, name in enumerate(drawn.blocks):
            with passage.only(number, number + 1, head=False), mixed_precision(passage.device), rows_of_their_own():
                targets = _through(passage, shelf, rows, original)
                if name in own and name not in trained:
                    task = _Block(model, passage, rows, quantized, targets, spec)
                    generator.manual_seed(seeds[number])
                    trained[name] = task.train(name, own[name], training, held_back, generator, bar.update, workers)
                    if keep is not None:
                        keep(trained[name])
                original = targets
                now = trained[name].of(own[name]) if name in own else {}
                with _in_their_places(model, _modules(model, now, passage.device)):
                    quantized = _through(passage, shelf, rows, quantized)
    return _result(layers, own, trained)


def _result(
    layers: Mapping[str, dict[str, Tensor]], own: Mapping[str, Layers], trained: Mapping[str, TrainedBlock]
) -> tuple[Layers, ReconstructReport]:
    """All layers, those of the blocks as they were trained, and the blocks' reports."""
    found = {name: dict(tensors) for name, tensors in layers.items()}
    for name, block in trained.items():
        found |= block.of(own[name])
    return found, ReconstructReport(tuple(block.report for block in trained.values()))


@dataclass(frozen=True)
class _States:
    """Hidden states of every row, ``[T, hidden]`` on the CPU, and the numbers of the rows whose are finite."""

    rows: list[Tensor]
    finite: frozenset[int]


@dataclass(frozen=True)
class _Block:
    """A block to be trained: what it reads, and what it should give, of every row."""

    model: PreTrainedModel
    passage: Passage
    rows: Sequence[Tensor]
    entering: _States
    targets: _States
    spec: ReconstructSpec

    def train(
        self,
        name: str,
        layers: Layers,
        training: Sequence[int],
        held_back: Sequence[int],
        generator: torch.Generator,
        report: Callable[[int], object],
        workers: Workers,
    ) -> TrainedBlock:
        """The solved layers, trained on some rows, and what that did to others; ``report`` is told of tokens done."""
        solved = _modules(self.model, layers, self.passage.device)
        trainable = {layer: self._trainable(layer, module) for layer, module in solved.items()}
        with _in_their_places(self.model, trainable):
            before = self._error(held_back)
            self._optimize(list(trainable.values()), self._usable(training), generator, report)
            after = self._error(held_back)
        trained = {layer: module.quantized() for layer, module in trainable.items()}
        moved = _moved(solved, trained) if self.spec.codes else 0.0
        told = workers.tell(BlockReport(name, before, after, moved), 0)
        logger.info("Reconstructed %s: error %.4f -> %.4f", name, told.solved, told.trained)
        found: Layers = {}
        for layer, module in trained.items() if told.kept else ():
            for tensor in (module.weight.data, module.lut.data):
                workers.hand_over(tensor, 0)
            found[layer] = {"weight": module.weight.data.cpu(), "lut": module.lut.data.cpu()}
        return TrainedBlock(told, found)

    def _trainable(self, name: str, layer: GuidedLinear) -> TrainedLinear | LatentLinear:
        if not self.spec.codes:
            return TrainedLinear(layer)
        return LatentLinear(layer, dense_weight(self.model.get_submodule(name)).to(self.passage.device))

    def _optimize(
        self,
        layers: Sequence[TrainedLinear | LatentLinear],
        which: Sequence[int],
        generator: torch.Generator,
        report: Callable[[int], object],
    ) -> None:
        spec = self.spec
        groups = [group for layer in layers for group in _groups(layer, spec)]
        latent = [layer for layer in layers if isinstance(layer, LatentLinear)]

        def settle() -> None:
            for layer in latent:
                layer.settle()

        device = self.passage.device
        # How large gradients are depends on the model; what is tiny for one is not for another.
        steps = Steps(
            lambda *inputs: self._squared(*inputs)[0],
            groups,
            eps=1e-20,
            after=settle,
            graphs=worth_graphs(self.model, device),
        )
        done, total = 0, spec.epochs * sum(self.rows[index].numel() for index in which)
        with ExitStack() as stack:
            stack.enter_context(_only_these(self.model, groups))
            stack.enter_context(repeatable_backward(device, lambda: steps.try_out(*self._inputs(which[:1]))))
            for _ in range(spec.epochs):
                for batch in batches(self.rows, shuffled(which, generator), spec.batch_tokens):
                    tokens = sum(self.rows[index].numel() for index in batch)
                    for together in stacks(self.rows, batch):
                        steps.add(*self._inputs(together))
                    steps.step(rate((done + tokens / 2) / total))
                    done += tokens
                    report(tokens)
        if problem := steps.left_out():
            logger.warning("Reconstructing a block: %s.", problem)

    @torch.no_grad()
    def _error(self, which: Sequence[int]) -> float:
        """Squared error over some rows, relative to the squares of what the original gives."""
        parts = [
            torch.stack(self._squared(*(stacked(rows, self.passage.device) for rows in self._inputs(stack))))
            for stack in stacks(self.rows, self._usable(which))
        ]
        error, square = torch.stack(parts).sum(dim=0).tolist()
        return error / max(square, 1e-300)

    def _inputs(self, stack: Sequence[int]) -> tuple[list[Tensor], ...]:
        """Rows of one length: token ids, the hidden states that enter and those that the original gives."""
        sources = (self.rows, self.entering.rows, self.targets.rows)
        return tuple([source[index] for index in stack] for source in sources)

    def _squared(self, ids: Tensor, entering: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Squared error of rows of one length, and the squares of what the original gives."""
        given, wanted = self.passage.run(ids, entering), wanted.float()
        return (given.float() - wanted).square().sum(), wanted.square().sum()

    def _usable(self, which: Sequence[int]) -> list[int]:
        """Rows whose hidden states are finite; all, if there are none."""
        finite = self.targets.finite & self.entering.finite
        good = [index for index in which if index in finite]
        return good or list(which)


def _through(passage: Passage, shelf: Shelf, rows: Sequence[Tensor], states: _States | None = None) -> _States:
    """What leaves the part. The states that enter it are lost, because it takes their place."""
    found: dict[int, Tensor] = {}
    finite: dict[int, Tensor] = {}
    with torch.no_grad():
        for stack in stacks(rows, range(len(rows))):
            places = [None if states is None else states.rows[index] for index in stack]
            entering = None if states is None else stacked([states.rows[index] for index in stack], passage.device)
            left = passage.run(stacked([rows[index] for index in stack], passage.input_device), entering)
            found |= {index: shelf.put(*pair) for index, *pair in zip(stack, left, places, strict=True)}
            finite |= dict(zip(stack, left.isfinite().flatten(1).all(dim=1), strict=True))
    shelf.settle()
    return _States([found[index] for index in range(len(rows))], frozenset(i for i, good in finite.items() if good))


def _modules(model: nn.Module, layers: Layers, device: torch.device) -> dict[str, GuidedLinear]:
    """Quantized layers with the original's biases."""
    found = {}
    for name, tensors in layers.items():
        module = model.get_submodule(name)
        there = {key: tensor.to(device) for key, tensor in tensors.items()}
        found[name] = GuidedLinear.from_tensors(there, dense_weight(module).shape[1], module.bias)  # type: ignore[arg-type]
    return found


@contextmanager
def _in_their_places(model: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """Other layers for a while."""
    before = {name: model.get_submodule(name) for name in layers}
    try:
        for name, module in layers.items():
            replace_module(model, name, module)
        yield
    finally:
        for name, module in before.items():
            replace_module(model, name, module)


def _groups(layer: TrainedLinear | LatentLinear, spec: ReconstructSpec) -> list[dict[str, Any]]:
    """A group for the codebook, and one for the latent numbers if codes move, each with its largest step."""
    unit = spacing(layer.codebook)
    groups: list[dict[str, Any]] = [{"params": [layer.codebook], "largest": spec.learning_rate * unit}]
    if isinstance(layer, LatentLinear):
        step = spec.latent_learning_rate * unit
        groups.append({"params": [layer.shift], "largest": step, "decay": spec.latent_decay})
    return groups


@contextmanager
def _only_these(model: nn.Module, groups: Sequence[dict[str, Any]]) -> Iterator[None]:
    """Gradients of the groups' parameters only."""
    trained = {id(parameter) for group in groups for parameter in group["params"]}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in trained]
    try:
        for parameter in others:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)


def _moved(before: Mapping[str, GuidedLinear], after: Mapping[str, GuidedLinear]) -> float:
    """Share of the codes that differ."""
    moved = count = 0
    for name, layer in before.items():
        codes, others = (unpack_codes(one.bit_planes(), one.in_features) for one in (layer, after[name]))
        moved += int((codes != others).sum())
        count += codes.numel()
    return moved / count


__all__ = ["check_blocks", "reconstruct"]
