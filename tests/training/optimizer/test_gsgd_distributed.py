"""GSGD under DistributedDataParallel: two processes step as one.

Sharded parameters are refused by name.
"""

from __future__ import annotations

import copy
import socket
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from path_networks import converted, loss
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from pathconvert.errors import PathconvertError, RecordError
from pathconvert.training import GSGD, path_parameter_groups

STEPS = 3


def network() -> tuple[nn.Module, Tensor]:
    """A float32 network in Path-BN form, in evaluation mode, because the processes have different
    batches.
    """
    _, model, _, batches = converted("cnn with BatchNorm", skip_scale=1.0)
    return model.float().eval(), torch.cat(batches).float()


def train(model: nn.Module, optimizer: GSGD, x: Tensor) -> None:
    for _ in range(STEPS):
        optimizer.zero_grad()
        (loss(model(x)) / len(x)).backward()
        optimizer.step()


def worker(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model, x = network()
    optimizer = GSGD(path_parameter_groups(model), lr=1e-6, momentum=0.9, weight_decay=0.1)
    train(DistributedDataParallel(model), optimizer, x[rank::2])
    torch.save(list(model.parameters()), Path(folder) / f"{rank}.pt")
    refused = []
    for wrap in (DistributedDataParallel, lambda m: fully_shard(copy.deepcopy(m), mesh=mesh())):
        try:
            path_parameter_groups(wrap(model))
        except (PathconvertError, RecordError) as error:
            refused.append(str(error))
    torch.save(refused, Path(folder) / f"refused{rank}.pt")
    dist.destroy_process_group()


def mesh() -> dist.DeviceMesh:
    return dist.init_device_mesh("cpu", (2,))


def test_two_processes_step_as_one(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(worker, (port, str(tmp_path)), nprocs=2)
    model, x = network()
    before = copy.deepcopy(model)
    train(model, GSGD(path_parameter_groups(model), lr=1e-6, momentum=0.9, weight_decay=0.1), x)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2))
    for p, b, one, two in zip(model.parameters(), before.parameters(), first, second, strict=True):
        assert torch.equal(one, two)
        scale = float(p.detach().abs().max())
        # float32: sums in another order
        assert float((one - p).detach().abs().max()) < 1e-6 * max(scale, 1.0)
        assert not torch.equal(p, b)
    wrapped, sharded = torch.load(tmp_path / "refused0.pt")
    assert "this DistributedDataParallel holds no conversion record" in wrapped
    assert "is a DTensor: GSGD needs whole parameters, not sharded or other special ones" in sharded
