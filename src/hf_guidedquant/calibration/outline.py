"""What a row takes of memory, decoder block by decoder block: found by running the model on tensors without data."""

import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ..errors import GuidedQuantError
from ..linears import is_linear
from ..running import evaluating
from .collector import end_loss, gradients_of_activations_only

logger = logging.getLogger(__name__)

# Of a row that only shows where gradients lead.
_FEW_TOKENS = 16


class Operation(NamedTuple):
    """Floating-point operations of matrix products, and bytes read and written; whether in the backward pass."""

    flops: int
    nbytes: int
    backward: bool


@dataclass(frozen=True)
class Outline:
    """The order in which a model runs, and the memory that a row takes on the way.

    Attributes:
        blocks: Names of the decoder blocks in the order that they run, if the model can be run in parts: each block
            once, and nothing but hidden states leads from one to the next. Otherwise empty.
        outputs: Of every block: None if it gives a tensor, the length if a tuple, of which the first are the states.
        places: Name of a module -> number of the block that it runs in. What runs before the blocks counts to the
            first, what runs after them to the last.
        twins: Linear module -> an earlier one that reads the very same activations, as q, k and v do.
        guided: Whether the row was run backward, too.
        tokens: Length of the row.
        reads: Linear module -> tokens of the row that it reads; of an expert, if all experts read as many.
        before: Bytes that are there when the first block starts.
        border: Bytes of the hidden states that enter a block.
        kept: Bytes that stay from each block's forward pass until its backward pass.
        extra: Bytes beside those, at the worst moment of each block, forward or backward.
        after: The same from the last block to the loss and back; of a model without blocks, of everything.
        work: All operations of the row.
        behind: From which to before which of these belong to what runs behind the blocks, and to the loss.
    """

    blocks: tuple[str, ...] = ()
    outputs: tuple[int | None, ...] = ()
    places: dict[str, int] = field(default_factory=dict)
    twins: dict[str, str] = field(default_factory=dict)
    guided: bool = False
    tokens: int = 0
    reads: dict[str, int] = field(default_factory=dict)
    before: int = 0
    border: int = 0
    kept: tuple[int, ...] = ()
    extra: tuple[int, ...] = ()
    after: int = 0
    work: tuple["Operation", ...] = field(default=(), repr=False, compare=False)
    behind: tuple[int, int] = field(default=(0, 0), repr=False, compare=False)

    @property
    def block_work(self) -> tuple["Operation", ...]:
        """Operations of the blocks, and of what runs before them."""
        start, stop = self.behind
        return self.work[:start] + self.work[stop:]

    def row_bytes(self, blocks: Sequence[int]) -> int:
        """Bytes that a row takes at the worst moment on its way through some of the blocks, in order."""
        total, worst = self.before, 0
        for block in blocks:
            total += self.kept[block]
            worst = max(worst, total + self.extra[block])
        return max(worst, total + self.after) if not blocks or blocks[-1] == len(self.blocks) - 1 else worst

    def block_bytes(self, block: int) -> int:
        """Bytes that a row takes at the worst moment in a block alone."""
        return self.before + self.kept[block] + self.extra[block]


def outline(
    model: PreTrainedModel, tokens: int, guided: bool, place: Callable[[torch.device], torch.device]
) -> Outline:
    """Run ``model`` without data, forward and, if ``guided``, backward.

    Args:
        model: On any devices, the meta device included.
        tokens: Length of the row.
        guided: Whether there is a backward pass.
        place: Where weights of a device are when the model runs.

    Returns:
        Its outline. Code that does not run without data gives an empty one, after a warning.

    Raises:
        ModelError: The model gives no logits.
    """
    watch = _Watch(guided, tokens)
    # A single token is asked for only to see which layers are called.
    if not guided and tokens > 1 and not _runs_apart(model, min(tokens, _FEW_TOKENS), place):
        watch.apart = False
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        if guided:
            stack.enter_context(gradients_of_activations_only(model))
        stack.enter_context(torch.set_grad_enabled(guided))
        stack.enter_context(watch.watching(model))
        try:
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            tensors = {
                name: torch.empty(tensor.shape, dtype=tensor.dtype, device=place(tensor.device))
                for name, tensor in chain(model.named_parameters(), model.named_buffers())
            }
            embeddings: Any = model.get_input_embeddings()
            device = place(embeddings.weight.device)
            ids = torch.zeros(tokens, dtype=torch.int64, device=device)
            watch.memory.leave_out([*tensors.values(), ids])
            stack.enter_context(watch.memory)
            stack.enter_context(_own_tensors(model))
            output = functional_call(model, tensors, (), {"input_ids": ids.unsqueeze(0), "use_cache": False})
            if guided:
                loss = end_loss(output, ids)
                # As in a run, only what gradients need is still there.
                del output
                watch.memory.backward = True
                loss.backward()
            return watch.outline()
        except GuidedQuantError:
            raise
        except Exception as error:  # noqa: BLE001  Any model's code runs here.
            logger.warning("What %s takes of memory cannot be foretold: %s", type(model).__name__, error)
            return Outline()


def _runs_apart(model: PreTrainedModel, tokens: int, place: Callable[[torch.device], torch.device]) -> bool:
    """Whether nothing but hidden states leads from block to block, which only gradients tell."""
    try:
        return bool(outline(model, tokens, True, place).blocks)
    except GuidedQuantError:  # A model without logits has no gradients to follow.
        return True


@contextmanager
def _own_tensors(model: nn.Module) -> Iterator[None]:
    """Modules have their tensors back at the end; ``functional_call`` forgets those of modules with two names."""
    kept = [(module, dict(module._parameters), dict(module._buffers)) for module in model.modules()]
    try:
        yield
    finally:
        for module, parameters, buffers in kept:
            module._parameters.update(parameters)
            module._buffers.update(buffers)


def hidden_states(args: tuple, kwargs: dict[str, Any]) -> Any:
    """What a decoder block is given to work on."""
    return args[0] if args else kwargs.get("hidden_states")


def replace_hidden_states(args: tuple, kwargs: dict[str, Any], states: Any) -> tuple[tuple, dict[str, Any]]:
    """Arguments of a decoder block that works on other hidden states."""
    return ((states, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": states})


class Memory(TorchDispatchMode):
    """Bytes of the tensors that operations inside have made and that are still alive; and the operations."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self._peak = 0
        self._alive: set[int] = set()
        self.work: list[Operation] = []
        self.backward = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [tensor for tensor in tree_leaves(result) if isinstance(tensor, Tensor)]
        for tensor in made:
            self._add(tensor.untyped_storage())
        if not func.is_view and "empty" not in func.__name__:
            nbytes = sum(t.nbytes for t in (*made, *tree_leaves((args, kwargs))) if isinstance(t, Tensor))
            self.work.append(Operation(_flops(func, args, kwargs or {}, result), nbytes, self.backward))
        return result

    def leave_out(self, tensors: Iterable[Tensor]) -> None:
        """Not count these, nor views of them."""
        self._alive |= {tensor.untyped_storage()._cdata for tensor in tensors}

    def peak(self) -> int:
        """The most bytes since this was asked for the last time."""
        peak, self._peak = self._peak, self.now
        return peak

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._alive:
            self._alive.add(key)
            self.now += size
            self._peak = max(self._peak, self.now)
            weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.now -= size


def _flops(func: Any, args: tuple, kwargs: dict[str, Any], result: Any) -> int:
    """Operations of a matrix product or of attention."""
    packet = func._overloadpacket
    if packet in flop_registry:
        return flop_registry[packet](*args, **kwargs, out_val=result)
    if "scaled_dot_product" in packet.__name__:
        # Two products of [T, D] and [D, T] forward, five backward, per head.
        tensors = [t for t in args if isinstance(t, Tensor) and t.dim() == 4]
        queries, keys = tensors[1:3] if "backward" in packet.__name__ else tensors[:2]
        return (10 if "backward" in packet.__name__ else 4) * queries.numel() * keys.shape[-2]
    return 0


@dataclass
class _Block:
    """Bytes of a block's hidden states, bytes when it starts and ends, and the most while it runs, both ways."""

    name: str
    states: int
    start: int
    before: int
    end: int = 0
    forward: int = 0
    backward: int = 0
    output: int | None = None


class _Watch:
    """Notes the memory whenever hidden states, or their gradients, come to a border between blocks."""

    def __init__(self, guided: bool, tokens: int) -> None:
        self.memory = Memory()
        self._tokens = tokens
        self._guided = guided
        self._blocks: list[_Block] = []
        self._places: dict[str, int] = {}
        self._twins: dict[str, str] = {}
        self._reads_of: dict[str, int] = {}
        # Activations that linear modules have read, by id, in which state, and by whom first.
        self._read: dict[int, tuple[weakref.ref[Tensor], int, str]] = {}
        self._after = 0
        # Operations that were done when the last block ended, and when its gradient came.
        self._behind, self._back = 0, 0
        self.apart = True  # nothing but hidden states leads from block to block

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        with ExitStack() as stack:
            outer = ""
            for name, module in model.named_modules():
                if isinstance(module, GradientCheckpointingLayer) and not (outer and name.startswith(outer)):
                    outer = name + "."
                    stack.callback(module.register_forward_pre_hook(self._starts(name), with_kwargs=True).remove)
                    stack.callback(module.register_forward_hook(self._ends).remove)
                stack.callback(module.register_forward_pre_hook(self._runs(name)).remove)
            yield

    def _runs(self, name: str) -> Callable[..., None]:
        def runs(module: nn.Module, args: tuple) -> None:
            self._places[name] = max(0, len(self._blocks) - 1)
            if is_linear(module):
                self._reads_of[name] = args[0].shape[:-1].numel()
                self._reads(name, args[0])

        return runs

    def _reads(self, name: str, activations: Tensor) -> None:
        tensor, version, other = self._read.get(id(activations), (lambda: None, 0, ""))
        if tensor() is activations and version == activations._version:
            self._twins[name] = other
        else:
            self._read[id(activations)] = weakref.ref(activations), activations._version, name

    def _starts(self, name: str) -> Callable[..., None]:
        def starts(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            states = hidden_states(args, kwargs)
            others = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t is not states]
            again = any(block.name == name for block in self._blocks)
            if again or not isinstance(states, Tensor) or any(tensor.requires_grad for tensor in others):
                self.apart = False
            self._blocks.append(_Block(name, getattr(states, "nbytes", 0), self.memory.now, self.memory.peak()))

        return starts

    def _ends(self, module: nn.Module, args: tuple, output: Any) -> None:
        number, block = len(self._blocks) - 1, self._blocks[-1]
        block.end, block.forward = self.memory.now, self.memory.peak()
        self._behind = self._back = len(self.memory.work)
        states = output[0] if isinstance(output, tuple) else output
        block.output = len(output) if isinstance(output, tuple) else None
        if not isinstance(states, Tensor):
            self.apart = False
        elif self._guided:
            # A gradient at the border: the backward pass of what lies behind is over.
            states.register_hook(lambda grad: self._comes_back(number))

    def _comes_back(self, number: int) -> None:
        peak = self.memory.peak()
        if number == len(self._blocks) - 1:
            self._after = peak
            self._back = len(self.memory.work)
        else:
            self._blocks[number + 1].backward = peak

    def outline(self) -> Outline:
        rest = self.memory.peak()
        blocks = self._blocks
        if not blocks:
            return Outline(tokens=self._tokens, reads=self._reads_of, after=rest, work=tuple(self.memory.work))
        if self._guided:
            blocks[0].backward = rest
        else:
            self._after = rest
        if not self.apart:
            highest = max(rest, self._after, *(max(b.before, b.forward, b.backward) for b in blocks))
            return Outline(tokens=self._tokens, reads=self._reads_of, after=highest, work=tuple(self.memory.work))
        ends = [block.start for block in blocks[1:]] + [blocks[-1].end]
        return Outline(
            blocks=tuple(block.name for block in blocks),
            outputs=tuple(block.output for block in blocks),
            places=self._places,
            twins=self._twins,
            guided=self._guided,
            tokens=self._tokens,
            reads=self._reads_of,
            before=blocks[0].start,
            border=max(block.states for block in blocks),
            kept=tuple(end - block.start for block, end in zip(blocks, ends, strict=True)),
            extra=tuple(max(b.forward, b.backward) - end for b, end in zip(blocks, ends, strict=True)),
            after=self._after - ends[-1],
            work=tuple(self.memory.work),
            behind=(self._behind, self._back if self._guided else len(self.memory.work)),
        )
