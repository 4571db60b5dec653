"""Several processes, started as `torchrun` starts them, on a CPU with gloo."""

import subprocess
import sys

import pytest

from hf_guidedquant.workers import Workers

PRIMITIVES = """
import torch
from hf_guidedquant.errors import WorkerError
from hf_guidedquant.workers import Workers

workers = Workers()
assert workers.size == 2
assert workers.share([10, 11, 12]) == ([10, 12], [11])[workers.rank]
assert workers.smallest(7 - workers.rank) == 6
tensor = torch.full((3,), float(workers.rank + 1))
workers.add_up(tensor, 1)
assert workers.rank == 0 or tensor.tolist() == [3.0, 3.0, 3.0]
workers.hand_over(tensor, 1)
assert tensor.tolist() == [3.0, 3.0, 3.0]
assert workers.tell({"rank": workers.rank}, 1) == {"rank": 1}
workers.check_agreement({"seed": 0, "data": "x"})
try:
    workers.check_agreement({"data": "x", "seed": workers.rank})
except WorkerError as error:
    assert "seed (process 0: 0, process 1: 1)" in str(error)
else:
    raise AssertionError
print(f"finished {workers.rank}")
"""

LOST = """
import os
import torch
from hf_guidedquant.workers import Workers

workers = Workers()
if workers.rank == 1:
    raise SystemExit("the disk is on fire")
workers.add_up(torch.zeros(3), 0)
print("went on alone")
"""


def launch(script, tmp_path, processes=2):
    path = tmp_path / "script.py"
    path.write_text(script, encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={processes}",
        str(path),
    ]
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120)


def test_alone_nothing_happens():
    workers = Workers()
    assert (workers.rank, workers.size, workers.first) == (0, 1, True)
    assert workers.share([1, 2, 3]) == [1, 2, 3]
    assert workers.tell("value", 0) == "value"
    assert workers.smallest(3) == 3
    workers.check_agreement({"seed": 0})


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_work_is_shared_out_evenly(size):
    workers = Workers()
    workers.size = size
    costs = [5.0, 1.0, 8.0, 3.0, 3.0, 2.0, 7.0, 1.0]
    owners = workers.owners(costs)
    load = [sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == rank) for rank in range(size)]
    assert sum(load) == sum(costs)
    # Graham's bound for jobs given to whoever is idle.
    assert max(load) <= sum(costs) / size + (1 - 1 / size) * max(costs) + 1e-9


def test_two_processes(tmp_path):
    done = launch(PRIMITIVES, tmp_path)
    assert done.returncode == 0, done.stdout
    assert "finished 0" in done.stdout
    assert "finished 1" in done.stdout


def test_a_process_that_dies_stops_all(tmp_path):
    done = launch(LOST, tmp_path)
    assert done.returncode != 0
    assert "the disk is on fire" in done.stdout
    assert "went on alone" not in done.stdout
