"""Better than solved: codes and codebooks trained against the original model, block by block and end to end."""

from .batches import held_back, stack_size
from .distillation import DistillReport, distill
from .divergence import Divergence, logit_bytes, output_head, teacher_states
from .reconstruction import BlockReport, ReconstructReport, check_blocks, reconstruct

__all__ = [
    "BlockReport",
    "DistillReport",
    "Divergence",
    "ReconstructReport",
    "check_blocks",
    "distill",
    "held_back",
    "logit_bytes",
    "output_head",
    "reconstruct",
    "stack_size",
    "teacher_states",
]
