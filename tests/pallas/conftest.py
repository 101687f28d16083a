import zlib

import numpy as np
import pytest

from ds4jax.pallas import lowering
from ds4jax.quant import api


@pytest.fixture
def rng(request):
    """Random numbers of this test's own."""
    return np.random.default_rng(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture
def on_device(monkeypatch):
    """Sets the compute capability of the device that kernels are lowered for; forgets what was traced for another."""

    def set_capability(capability):
        monkeypatch.setattr(lowering, "capability", lambda: capability)
        api._traced.cache_clear()

    yield set_capability
    api._traced.cache_clear()
