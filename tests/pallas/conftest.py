import zlib

import numpy as np
import pytest


@pytest.fixture
def rng(request):
    """Random numbers of this test's own."""
    return np.random.default_rng(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(autouse=True)
def every_kernel(monkeypatch):
    """Kernels that wait for their check on a GPU are tested all the same."""
    monkeypatch.setenv("DS4JAX_UNCHECKED_KERNELS", "1")
