"""Two threads in all: one for each of pytest-xdist's two workers."""

import os

import torch

torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)
