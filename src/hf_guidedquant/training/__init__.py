"""Better than solved: codes and codebooks trained against the original model, block by block and end to end."""

from .batches import check_rows, held_back, stack_size
from .blocks import BlockReport, Layers, ReconstructReport, TrainedBlock, flat_tensors, layers_by_block
from .distillation import DistilledEpochs, DistillReport, distill
from .divergence import Divergence, logit_bytes, output_head, teacher_states
from .reconstruction import check_blocks, reconstruct

__all__ = [
    "BlockReport",
    "DistillReport",
    "DistilledEpochs",
    "Divergence",
    "Layers",
    "ReconstructReport",
    "TrainedBlock",
    "check_blocks",
    "check_rows",
    "distill",
    "flat_tensors",
    "held_back",
    "layers_by_block",
    "logit_bytes",
    "output_head",
    "reconstruct",
    "stack_size",
    "teacher_states",
]
