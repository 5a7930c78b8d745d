"""A small network to write to files."""

import pytest
import torch
from checkpoint_files import Net


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()
