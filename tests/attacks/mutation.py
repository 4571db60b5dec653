"""Anything that a file could hold: values, trees and bytes that are nearly right."""

import json
import resource
import struct
from contextlib import contextmanager
from pathlib import Path

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

# No shrinking: it takes minutes, and the examples are small as they are.
EXAMPLES = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
_MORE_MEMORY = 300  # MiB that an example may take beyond what the tests before it took

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(2**31 - 1, 2**80)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["float32", "lnq", "1.9", "F16", "I32", "../..", "²", "9" * 5000, "\x1b[2J", "a\nb", "\ud800"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def _branches(tree, path=()):
    """Paths of all values in a tree of dictionaries and lists."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from _branches(value, (*path, key))


def mutate(data: st.DataObject, tree, spared=()) -> None:
    """One to three values anywhere in the tree become something else, go away, or get a neighbour."""
    for _ in range(data.draw(st.integers(1, 3))):
        paths = [path for path in _branches(tree) if path[0] not in spared]
        if not paths:
            return
        *parents, key = data.draw(st.sampled_from(paths))
        place = tree
        for parent in parents:
            place = place[parent]
        action = data.draw(st.sampled_from(["replace", "delete", "add"]))
        if action == "replace":
            place[key] = data.draw(json_values)
        elif action == "delete":
            del place[key]
        elif isinstance(place, list):
            place.append(data.draw(json_values))
        else:
            place[data.draw(st.text(max_size=8))] = data.draw(json_values)


def damage(data: st.DataObject, content: bytes, header: int) -> bytes:
    """Some bytes of the first ``header`` flipped, the end cut off, or both. Lengths at the start are hit often."""
    changed = bytearray(content)
    position = st.integers(0, 7) | st.integers(8, header - 1)
    for place in data.draw(st.lists(position, max_size=4)):
        changed[place] ^= data.draw(st.integers(1, 255))
    return bytes(changed[: data.draw(st.just(len(content)) | st.integers(0, len(content)))])


def split(file: Path) -> tuple[dict, bytes]:
    """The header of a safetensors file, and the bytes after it."""
    content = file.read_bytes()
    end = header_end(content)
    return json.loads(content[8:end]), content[end:]


def header_end(content: bytes) -> int:
    return 8 + struct.unpack("<Q", content[:8])[0]


def join(header: dict, content: bytes) -> bytes:
    encoded = json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + content


@contextmanager
def bounded_memory():
    before = _peak_memory()
    yield
    assert _peak_memory() < before + _MORE_MEMORY


def _peak_memory() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
