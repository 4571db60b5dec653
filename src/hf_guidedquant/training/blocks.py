"""Decoder blocks that are trained: which layers they hold, what training gives, and what it tells."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ..calibration import Outline

# The tensors of a solved layer, by its name (see :func:`hf_guidedquant.formats.lut.encode`).
Layers = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class BlockReport:
    """What training did to a decoder block, on rows that it was not trained on.

    Attributes:
        name: Of the block.
        solved, trained: Squared error of the hidden states that leave it, relative to the sum of their squares, before
            and after. The solved layers were kept if they were the better ones.
        moved: Share of the codes that are others now.
    """

    name: str
    solved: float
    trained: float
    moved: float

    @property
    def kept(self) -> bool:
        """Whether training helped."""
        return self.trained < self.solved

    @property
    def result(self) -> float:
        """The error of what was kept."""
        return self.trained if self.kept else self.solved


@dataclass(frozen=True)
class TrainedBlock:
    """A decoder block whose training is finished.

    Attributes:
        report: What training did to it.
        layers: New ``weight`` and ``lut`` of its layers, on the CPU; empty if the solved ones were better.
    """

    report: BlockReport
    layers: Layers

    def of(self, solved: Layers) -> Layers:
        """All tensors of the block's layers, of which those that were solved are given."""
        return {name: {**tensors, **self.layers.get(name, {})} for name, tensors in solved.items()}


@dataclass(frozen=True)
class ReconstructReport:
    """What training did, block by block."""

    blocks: tuple[BlockReport, ...]

    def describe(self) -> str:
        """One line for readers."""
        count = len(self.blocks)
        if not count:
            return "no decoder block has quantized layers"
        solved, result = (sum(getattr(b, which) for b in self.blocks) / count for which in ("solved", "result"))
        moved = sum(block.moved for block in self.blocks if block.kept) / count
        better = sum(block.kept for block in self.blocks)
        codes = f", {moved:.1%} of the codes moved" if moved else ""
        return (
            f"error of a block {solved:.4f} -> {result:.4f} on rows held back{codes} "
            f"({better} of {count} blocks are better)"
        )


def layers_by_block(drawn: Outline, layers: Mapping[str, dict[str, Tensor]]) -> dict[str, Layers]:
    """The layers within every block that has any, by the block's name, in the order of the blocks."""
    found = {
        block: {name: tensors for name, tensors in layers.items() if name.startswith(block + ".")}
        for block in drawn.blocks
    }
    return {block: own for block, own in found.items() if own}


def flat_tensors(layers: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of layers, by ``layer.tensor``."""
    return {f"{layer}.{name}": tensor for layer, tensors in layers.items() for name, tensor in tensors.items()}


__all__ = ["BlockReport", "Layers", "ReconstructReport", "TrainedBlock", "flat_tensors", "layers_by_block"]
