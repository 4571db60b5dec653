"""On a model that has learned something, better methods lose less of it."""

import copy
import math

import pytest
from trained_model import ROW, calibration_rows, held_out_ids, trained_model

import hf_guidedquant
from hf_guidedquant import GuidedQuantConfig
from hf_guidedquant.evaluate import perplexity


@pytest.fixture(scope="module")
def lost():
    """Nats per byte of held-out text that each method loses at 2 bits."""
    original = math.log(perplexity(trained_model(), None, held_out_ids(), ROW))
    found = {}
    for name, settings in {
        "rtn": {"method": "rtn"},
        "squeezellm": {"method": "squeezellm"},
        "plain": {"guided": False},
        "guided": {"guided": True},
        "guided 3 bits": {"bits": 3},
        "curvature": {"output_curvature": True},
        "curvature 3 bits": {"bits": 3, "output_curvature": True},
        "squeezellm, sparse": {"method": "squeezellm", "outliers": 0.0045},
        "guided, sparse": {"outliers": 0.0045},
    }.items():
        config = GuidedQuantConfig(**{"bits": 2, "dataset": calibration_rows(), **settings})
        model = hf_guidedquant.quantize(copy.deepcopy(trained_model()), config)
        found[name] = math.log(perplexity(model, None, held_out_ids(), ROW)) - original
    return found


def test_the_model_has_learned_something():
    # Bytes of English drawn by their frequency alone have a perplexity of about 20.
    assert perplexity(trained_model(), None, held_out_ids(), ROW) < 10


def test_the_order_of_methods(lost):
    """RTN is far off, weighted k-means far better, and coordinate descent far better again, guided or not.

    Guided against plain is within this toy's noise; benchmarks/quality.py shows it on a real model.
    """
    assert lost["rtn"] > 1.2 * lost["squeezellm"]
    assert lost["squeezellm"] > 1.5 * max(lost["plain"], lost["guided"])


def test_another_bit_loses_less(lost):
    assert lost["guided"] > 2 * lost["guided 3 bits"]


def test_outputs_that_know_of_each_other_lose_less(lost):
    assert lost["curvature"] < lost["guided"]
    assert lost["curvature 3 bits"] < lost["guided 3 bits"]


def test_outliers_beside_the_codes_lose_less(lost):
    """One of 64 weights: half a bit more."""
    assert lost["guided, sparse"] < lost["guided"]
    assert lost["squeezellm, sparse"] < lost["squeezellm"]
