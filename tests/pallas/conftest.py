import zlib

import numpy as np
import pytest


@pytest.fixture
def rng(request):
    """Random numbers of this test's own."""
    return np.random.default_rng(zlib.crc32(request.node.nodeid.encode()))
