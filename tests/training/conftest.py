"""The settings and the Buffer of a pool of the tiny model."""

import pytest


@pytest.fixture(scope="module")
def config(quick):
    return quick(rank=4, alpha=8.0, steps=30, packing=96, log_every=7)


@pytest.fixture(scope="module")
def buffer(make_adapter):
    return make_adapter("buffer", seed=1)
