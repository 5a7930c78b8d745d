"""The GPU's paths: on a GPU where PyTorch finds one, else the same code on the CPU.

What cannot run without a GPU is marked ``gpu``. ``benchmarks/gpu.py`` runs both kinds on a GPU and
keeps the figures that the fixture ``measured`` is told.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from path_bn_networks import draw, error, geometry, layers, resnet_and_images
from path_networks import converted, loss
from sample_networks import network
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import pathconvert
from pathconvert.training import GSGD, path_parameter_groups
from pathconvert.training.optimizer.layout import Layout
from pathconvert.training.run.sync_batch_norm import synchronise_batch_norms

pytestmark = pytest.mark.device

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
#: float64 against float64 in another order of sums.
EXACT = 1e-10
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "momentum, decay, balanced": {"momentum": 0.9, "weight_decay": 0.1, "anchor": "balanced"},
    "as the papers": {"anchor": None, "start": "weight", "weight_norm": True},
}

# ---- forward -------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["path", "path-bn"])
@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1", "shufflenet_v2_x0_5"])
def test_forward_is_that_of_the_cpu(name: str, form: str, measured) -> None:
    """float64, evaluation and training mode."""
    x = draw(4, 3, 64, 64)
    model = pathconvert.reparameterize(network(name, torch.float64), x).model
    if form == "path-bn":
        model = pathconvert.to_path_bn(model, x, calibration=x)
    moved = copy.deepcopy(model).to(DEVICE)
    for training in (False, True):
        torch.manual_seed(0)
        expected = _without_dropout(model).train(training)(x)
        found = _without_dropout(moved).train(training)(x.to(DEVICE)).cpu()
        difference = error(found, expected)
        measured(f"difference, {'training' if training else 'evaluation'}", difference)
        assert difference < EXACT


def _without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def test_channels_last(measured) -> None:
    """The same outputs and steps as of contiguous tensors, float64."""
    found = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        _, model, _, batches = converted("residual block", skip_scale=1.0)
        model.to(DEVICE, memory_format=memory_format)
        images = [x.to(DEVICE).contiguous(memory_format=memory_format) for x in batches]
        found.append(_trained(model, images, 5, momentum=0.9))
    measured("difference", difference := _difference(*found))
    assert difference < EXACT


# ---- steps ---------------------------------------------------------------------------------------


def _trained(
    model: nn.Module, batches: list[Tensor], steps: int, **settings: Any
) -> dict[str, Tensor]:
    """The parameters after so many steps, on the CPU."""
    optimizer = GSGD(path_parameter_groups(model), **({"lr": 1e-4} | settings))
    for i in range(steps):
        optimizer.zero_grad()
        _loss(model(batches[i % len(batches)])).backward()
        optimizer.step()
    return {name: p.detach().cpu() for name, p in model.named_parameters()}


def _loss(y: Tensor) -> Tensor:
    return loss(y.cpu()) if y.is_cuda else loss(y)


def _difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest of any parameter, over that parameter's largest element."""
    return max(error(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("settings", OPTIMIZERS)
@pytest.mark.parametrize("name", ["cnn with BatchNorm", "residual block"])
def test_twenty_steps_are_those_of_the_cpu(
    name: str, settings: str, foreach: bool, measured
) -> None:
    """float64, against the loop on the CPU."""
    chosen = OPTIMIZERS[settings]
    if chosen.get("anchor", "initial") is None:
        chosen = chosen | {"lr": 1e-9}  # 1 / d² multiplies the rate
    _, reference, _, batches = converted(name, skip_scale=1.0)
    _, model, _, _ = converted(name, skip_scale=1.0)
    expected = _trained(reference, batches, 20, foreach=False, **chosen)
    found = _trained(
        model.to(DEVICE), [x.to(DEVICE) for x in batches], 20, foreach=foreach, **chosen
    )
    measured("difference", difference := _difference(found, expected))
    assert difference < EXACT


@pytest.mark.gpu
@pytest.mark.parametrize("settings", OPTIMIZERS)
def test_a_captured_step_follows_a_changing_rate(settings: str, measured) -> None:
    """A whole step as a CUDA graph, its rate a tensor: as steps one by one."""
    chosen = {"lr": 1e-9 if settings == "as the papers" else 1e-4} | OPTIMIZERS[settings]
    found = []
    for captured in (False, True):
        _, model, _, batches = converted("residual block", skip_scale=1.0)
        model.to("cuda")
        x = batches[0].cuda()
        rate = torch.tensor(chosen["lr"], dtype=torch.float64, device="cuda")
        optimizer = GSGD(path_parameter_groups(model), **(chosen | {"lr": rate}))
        weights = torch.arange(1, 4, device="cuda")

        def step(
            model: nn.Module = model,
            optimizer: GSGD = optimizer,
            x: Tensor = x,
            w: Tensor = weights,
        ) -> None:
            optimizer.zero_grad(set_to_none=False)
            (model(x).sin() * w).square().sum().backward()
            optimizer.step()

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        if captured:
            with torch.cuda.graph(graph):
                step()
        for _ in range(5):
            graph.replay() if captured else step()
            rate.mul_(0.5)
        found.append({name: p.detach().cpu() for name, p in model.named_parameters()})
    measured("difference", difference := _difference(*found))
    assert difference < EXACT


@pytest.mark.parametrize("tensor_rate", [False, True])
@pytest.mark.parametrize("settings", OPTIMIZERS)
def test_a_step_needs_nothing_of_the_cpu(settings: str, tensor_rate: bool) -> None:
    """On tensors of the GPU without numbers: any other device, and any read of a value, raises.

    Needs no GPU.
    """
    _, model, _, batches = converted("residual block", skip_scale=1.0)
    optimizer = GSGD(
        path_parameter_groups(model), **({"lr": 1e-6} | OPTIMIZERS[settings]), foreach=True
    )
    loss(model(batches[0])).backward()
    optimizer.step()  # makes the layout and the state
    mode = FakeTensorMode()
    _move_to_fake_gpu(optimizer, mode)
    with mode:
        if tensor_rate:
            for group in optimizer.param_groups:
                group["lr"] = torch.empty((), device="cuda")
        for _ in range(2):
            optimizer.step()
    assert {p.device.type for group in optimizer.param_groups for p in group["params"]} == {"cuda"}


@pytest.mark.parametrize("settings", OPTIMIZERS)
def test_a_step_changes_its_state_in_place(settings: str) -> None:
    """A CUDA graph replays addresses: a state that is replaced would be read as it was at the
    capture.
    """
    _, model, _, batches = converted("residual block", skip_scale=1.0)
    optimizer = GSGD(path_parameter_groups(model), **({"lr": 1e-6} | OPTIMIZERS[settings]))
    loss(model(batches[0])).backward()
    places, values = [], []
    for _ in range(2):
        optimizer.step()
        states = {
            (i, key): t for i, s in enumerate(optimizer.state.values()) for key, t in s.items()
        }
        places.append({name: t.data_ptr() for name, t in states.items()})
        values.append({name: t.clone() for name, t in states.items()})
    assert places[0] == places[1]
    moving = {key for (i, key), t in values[0].items() if not torch.equal(t, values[1][i, key])}
    assert moving == ({"momentum_buffer", "chain_momentum"} if "momentum" in settings else set())


def _move_to_fake_gpu(optimizer: GSGD, mode: FakeTensorMode) -> None:
    """All that ``optimizer`` holds, onto a GPU that does not exist."""
    known: dict[int, tuple[Any, Any]] = {}  # with what they stand for, so that no id is used twice

    def moved(thing: Any) -> Any:
        if id(thing) not in known:
            known[id(thing)] = thing, _moved(thing)
        return known[id(thing)][1]

    def _moved(thing: Any) -> Any:
        if isinstance(thing, Tensor):
            fake = mode.from_tensor(thing.detach())
            with mode:
                fake = fake.to("cuda")
                if isinstance(thing, nn.Parameter):
                    fake = nn.Parameter(fake)
                    fake.grad = torch.empty_like(fake)
            return fake
        if isinstance(thing, dict):
            return {
                moved(key) if isinstance(key, Tensor) else key: moved(value)
                for key, value in thing.items()
            }
        if isinstance(thing, list | tuple):
            return type(thing)(moved(one) for one in thing)
        if dataclasses.is_dataclass(thing):
            return dataclasses.replace(
                thing, **{f.name: moved(getattr(thing, f.name)) for f in dataclasses.fields(thing)}
            )
        if isinstance(thing, Layout):
            made = copy.copy(thing)
            vars(made).update(moved(vars(thing)))
            return made
        return thing

    for path, group in zip(optimizer._paths, optimizer.param_groups, strict=True):
        if path is not None:
            layout = moved(path.layout(group))
            path.layout = lambda _, layout=layout: layout
        group["params"] = moved(group["params"])
    optimizer.state = defaultdict(dict, moved(dict(optimizer.state)))


# ---- precisions ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_costs_path_bn_no_more_than_batch_norm(dtype: torch.dtype, measured) -> None:
    """Errors against float64, of the network in Path-BN form over those of the network that it came
    from.
    """
    plain, x = resnet_and_images()
    path_bn = pathconvert.to_path_bn(plain, x, calibration=x)
    errors = []
    for model in (plain, path_bn):
        narrow = copy.deepcopy(model).float().to(DEVICE)
        with torch.autocast(DEVICE, dtype):
            errors.append(error(narrow(x.float().to(DEVICE)).double().cpu(), model(x)))
    measured("error over the original's", errors[1] / errors[0])
    # two draws of the same noise, and one rounding more for every layer
    assert errors[1] < 4 * errors[0]


def test_fp16_with_a_grad_scaler(measured) -> None:
    """A step whose gradients overflow is left out.

    Other gradients are those of float32 up to fp16's rounding.
    """
    gradients: dict[tuple[torch.dtype, float], Tensor] = {}
    for dtype, scale in ((torch.float32, 1.0), (torch.float16, 2.0**8), (torch.float16, 2.0**100)):
        _, model, _, batches = converted("residual block", skip_scale=1.0)
        model.float().to(DEVICE)
        before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
        optimizer = GSGD(path_parameter_groups(model), lr=1e-4)
        scaler = torch.amp.GradScaler(DEVICE, init_scale=scale)
        with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
            y = model(batches[0].float().to(DEVICE))
        scaler.scale(_loss(y.float())).backward()
        scaler.unscale_(optimizer)
        gradients[dtype, scale] = nn.utils.parameters_to_vector(
            [p.grad for p in model.parameters()]
        )
        scaler.step(optimizer)
        scaler.update()
        overflown = scale == 2.0**100
        assert torch.equal(nn.utils.parameters_to_vector(model.parameters()), before) == overflown
        assert scaler.get_scale() == (2.0**99 if overflown else scale)
    full, half = gradients[torch.float32, 1.0], gradients[torch.float16, 2.0**8]
    measured(
        "relative error of fp16's gradients",
        difference := float((half - full).norm() / full.norm()),
    )
    # hardly more than fp16's 2⁻¹¹, unless an activation that is almost 0 is 0 now, and its gradient
    # with it
    assert 0 < difference < 0.1


# ---- compiled, in processes ----------------------------------------------------------------------


def test_inductor_compiles_path_bn_without_a_graph_break(measured) -> None:
    """Forward and backward in training mode, float64; ``fullgraph`` raises at a break."""
    plain, x = geometry("3x3")
    model = pathconvert.to_path_bn(plain, x, calibration=x).train().to(DEVICE)
    assert layers(model)
    gradients = []
    for call in (model, torch.compile(model, fullgraph=True)):
        model.zero_grad()
        _loss(call(x.to(DEVICE))).backward()
        gradients.append(nn.utils.parameters_to_vector([p.grad for p in model.parameters()]).cpu())
    measured("difference of gradients", difference := error(gradients[1], gradients[0]))
    assert difference < EXACT


def test_synchronised_statistics_of_one_process(tmp_path: Path, measured) -> None:
    """BatchNorms over all processes, where there is one: as without."""
    backend = "nccl" if DEVICE == "cuda" else "gloo"
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        _, model, _, batches = converted("residual block", skip_scale=1.0)
        expected = _trained(copy.deepcopy(model).to(DEVICE), [x.to(DEVICE) for x in batches], 3)
        together = synchronise_batch_norms(model.to(DEVICE), torch.device(DEVICE))
        found = _trained(together, [x.to(DEVICE) for x in batches], 3)
    finally:
        torch.distributed.destroy_process_group()
    measured("difference", difference := _difference(found, expected))
    assert difference < EXACT
