"""Tests of Triton kernels without a GPU: Triton reads TRITON_INTERPRET once, so they run in a process of their own."""

import os
import subprocess
import sys

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreter_only = pytest.mark.skipif(not INTERPRETED, reason="runs in the interpreter's own process")
not_interpreted = pytest.mark.skipif(INTERPRETED, reason="the tests of this file run in this process")


def run_interpreted_tests(file: str) -> None:
    """Run the tests of a file that have "interpreted" in their names, under the interpreter."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file, "-k", "interpreted"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout
