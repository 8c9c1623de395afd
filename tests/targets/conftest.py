"""Images for the tests of targets."""

from __future__ import annotations

import pytest
from torch import Tensor


@pytest.fixture(scope="session")
def digits() -> Tensor:
    from vadiff.trainer.data.digits import digits

    return digits().train.float().div(127.5).sub(1.0)
