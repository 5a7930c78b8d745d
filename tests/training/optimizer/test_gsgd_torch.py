"""GSGD as a ``torch.optim.Optimizer``: the kinds of test that torch runs on its own optimizers,
with torch's machinery.

On plain parameters, and on a small network in path space.
"""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch
from gsgd_problems import GSGD_DB, SCHEDULERS, Problem, assert_same, pairs
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import lr_scheduler
from torch.testing._internal.common_device_type import instantiate_device_type_tests
from torch.testing._internal.common_optimizers import OptimizerErrorEnum, optims
from torch.testing._internal.common_utils import TestCase, parametrize

from pathconvert.errors import PathconvertError, RecordError
from pathconvert.training import GSGD, path_parameter_groups

RATE = torch.tensor(0.01, dtype=torch.float64)


class TestGSGD(TestCase):
    @optims(GSGD_DB)
    def test_errors(self, device, dtype, optim_info) -> None:
        for error in optim_info.optim_error_inputs_func(device=device, dtype=dtype):
            assert error.error_on == OptimizerErrorEnum.CONSTRUCTION_ERROR
            given = error.optimizer_error_input
            expect = (
                self.assertWarnsRegex
                if issubclass(error.error_type, Warning)
                else self.assertRaisesRegex
            )
            with expect(error.error_type, error.error_regex):
                GSGD(given.params, **given.kwargs)

    @parametrize("foreach", [False, True])
    @optims(GSGD_DB)
    def test_goes_in_the_right_direction(self, device, dtype, optim_info, foreach) -> None:
        for on_chains, settings in pairs(optim_info, device):
            problem = Problem(on_chains, device, dtype)
            settings["lr"] = settings.get("lr", 0.1) * (0.1 if on_chains else 1.0)
            optimizer = GSGD(problem.params, foreach=foreach, **settings)
            before = float(problem.loss().detach())
            for _ in range(10):
                optimizer.step(problem.backward)
            after = float(problem.loss().detach())
            assert (after > before) if settings.get("maximize") else (after < before), (
                on_chains,
                settings,
            )

    @optims(GSGD_DB, dtypes=[torch.float64, torch.float32])
    def test_foreach_matches_the_loop(self, device, dtype, optim_info) -> None:
        """Also with a parameter of no dimensions, and for a step without any gradients."""
        for on_chains, settings in pairs(optim_info, device):
            found = []
            for foreach in (False, True):
                problem = Problem(on_chains, device, dtype)
                scalar = nn.Parameter(torch.tensor(0.5, device=device, dtype=dtype))
                optimizer = GSGD(problem.params, foreach=foreach, **settings)
                optimizer.add_param_group({"params": [scalar]})
                for i in range(5):
                    problem.backward()
                    scalar.grad = torch.ones_like(scalar)
                    if i == 3:
                        optimizer.zero_grad(set_to_none=True)
                    optimizer.step()
                found.append((problem.weights(), scalar.detach(), optimizer.state_dict()["state"]))
            assert_same(*found)

    @optims(GSGD_DB)
    def test_tensor_lr_is_the_float(self, device, dtype, optim_info) -> None:  # noqa: ARG002
        for on_chains, lr in itertools.product((False, True), (RATE, RATE[None])):
            found = []
            for rate in (lr, 0.01):
                problem = Problem(on_chains, device, torch.float64)
                problem.train(GSGD(problem.params, lr=rate, weight_decay=0.1))
                found.append(problem.weights())
            assert_same(*found, 1e-12)

    @optims(GSGD_DB)
    def test_none_empty_and_zero_gradients(self, device, dtype, optim_info) -> None:
        for on_chains, settings in pairs(optim_info, device):
            problem = Problem(on_chains, device, dtype)
            empty = nn.Parameter(torch.empty(0, 3, device=device))
            optimizer = GSGD(problem.params, **settings)
            optimizer.add_param_group({"params": [empty]})
            before = problem.weights()
            optimizer.step()
            assert_same(problem.weights(), before)
            assert not any(
                key == "momentum_buffer" for state in optimizer.state.values() for key in state
            )
            for p in (*problem.model.parameters(), empty):
                p.grad = torch.zeros_like(p)
            optimizer.step()
            if not settings.get("weight_decay"):
                assert_same(problem.weights(), before)

    @optims(GSGD_DB)
    def test_state_dict_round_trip(self, device, dtype, optim_info) -> None:
        for on_chains, settings in pairs(optim_info, device):
            problem = Problem(on_chains, device, dtype)
            optimizer = GSGD(problem.params, **settings)
            problem.train(optimizer)
            other = copy.deepcopy(problem)
            resumed = GSGD(other.params, lr=7.0, start=settings.get("start", "bn"))
            resumed.load_state_dict(state_dict=copy.deepcopy(optimizer.state_dict()))
            mine, theirs = resumed.state_dict(), optimizer.state_dict()
            for group, saved in zip(mine["param_groups"], theirs["param_groups"], strict=True):
                for name in ("unit_gauge", "chain_starts"):
                    assert_same(group.pop(name, None), saved.pop(name, None))
                assert group == saved
            assert_same(mine["state"], theirs["state"])
            copied, copy_of_optimizer = copy.deepcopy((problem, optimizer))
            pickled, pickled_optimizer = pickle.loads(pickle.dumps((problem, optimizer)))
            problem.train(optimizer)
            for one, its in (
                (other, resumed),
                (copied, copy_of_optimizer),
                (pickled, pickled_optimizer),
            ):
                one.train(its)
                assert_same(one.weights(), problem.weights())

    @optims(GSGD_DB)
    def test_state_dicts_of_earlier_versions(self, device, dtype, optim_info) -> None:
        """Settings that an older state lacks get their defaults."""
        for on_chains in (False, True):
            problem = Problem(on_chains, device, dtype)
            optimizer = GSGD(problem.params, lr=0.01)
            problem.train(optimizer)
            old = copy.deepcopy(optimizer.state_dict())
            for group, flag in itertools.product(
                old["param_groups"], optim_info.not_og_supported_flags
            ):
                del group[flag]
            optimizer.load_state_dict(old)
            problem.train(optimizer)

    @optims(GSGD_DB)
    def test_a_state_of_another_dtype_or_choice_of_start(self, device, dtype, optim_info) -> None:  # noqa: ARG002
        problem = Problem(True, device, dtype)
        optimizer = GSGD(problem.params, lr=0.01, momentum=0.9, start="weight")
        problem.train(optimizer)
        wide = copy.deepcopy(problem)
        wide.model.double()
        wide.x, wide.y = wide.x.double(), wide.y.double()
        resumed = GSGD(wide.params)  # the state's choice counts, not the default "bn"
        resumed.load_state_dict(optimizer.state_dict())
        for p in wide.model.parameters():
            for value in resumed.state[p].values():
                assert value.dtype == p.dtype
        problem.train(optimizer)
        wide.train(resumed)
        assert resumed.chains[0].start == "weight"
        assert_same([w.float() for w in wide.weights()], problem.weights(), 1e-4)  # float32

    @optims(GSGD_DB)
    def test_a_network_that_moves(self, device, dtype, optim_info) -> None:  # noqa: ARG002
        """Moves to another device, dtype or memory format after the optimizer was made, while
        gradients come and go.
        """
        found = []
        for moved in (False, True):
            problem = Problem(True, "cpu", torch.float64 if not moved else torch.float32)
            optimizer = GSGD(problem.params, lr=0.01)
            if moved:
                problem.model.to(device, torch.float64, memory_format=torch.channels_last)
                problem.x, problem.y = problem.x.to(device).double(), problem.y.to(device).double()
            problem.train(optimizer)
            found.append([w.cpu() for w in problem.weights()])
        assert_same(*found, 1e-4)  # one of them began in float32

    @optims(GSGD_DB)
    def test_hooks(self, device, dtype, optim_info) -> None:  # noqa: ARG002
        problem = Problem(True, device, dtype)
        optimizer = GSGD(problem.params)
        called: list[str] = []
        handles = [
            optimizer.register_step_pre_hook(lambda *_: called.append("pre")),
            optimizer.register_step_post_hook(lambda *_: called.append("post")),
            optimizer.register_state_dict_post_hook(lambda *_: called.append("save")),
            optimizer.register_load_state_dict_post_hook(lambda *_: called.append("load")),
        ]
        problem.train(optimizer, 2)
        optimizer.load_state_dict(optimizer.state_dict())
        assert called == ["pre", "post"] * 2 + ["save", "load"]
        for handle in handles:
            handle.remove()

    @optims(GSGD_DB)
    def test_groups_of_their_own(self, device, dtype, optim_info) -> None:  # noqa: ARG002
        """Each group has its own settings; the path group may be added later.

        No parameter may occur twice.
        """
        found = []
        for later in (False, True):
            problem = Problem(True, device, dtype)
            path, ordinary = problem.params
            ordinary |= {"lr": 0.02, "momentum": 0.5, "foreach": True}
            optimizer = GSGD([ordinary] if later else [ordinary, path], lr=0.01)
            if later:
                optimizer.add_param_group(path)
            problem.train(optimizer)
            found.append(problem.weights())
            with pytest.raises(
                ValueError, match="some parameters appear in more than one parameter group"
            ):
                optimizer.add_param_group(path)
            problem.train(optimizer)  # as if nothing had been asked
        assert_same(*found)

    @parametrize("scheduler", list(SCHEDULERS))
    @optims(GSGD_DB)
    def test_schedulers(self, device, dtype, optim_info, scheduler) -> None:  # noqa: ARG002
        """Steps under a scheduler equal steps whose rates (and OneCycleLR's momenta) are set by
        hand.
        """
        for on_chains, tensor_lr in itertools.product((False, True), (False, True)):
            problem, by_hand = (Problem(on_chains, device, torch.float64) for _ in range(2))
            lr: Any = torch.tensor(0.01, dtype=torch.float64) if tensor_lr else 0.01
            optimizer = GSGD(problem.params, lr=lr, momentum=0.9)
            schedule = SCHEDULERS[scheduler](optimizer)
            reference = GSGD(by_hand.params, lr=0.01, momentum=0.9)
            rates = []
            for _ in range(6):
                for group, other in zip(
                    optimizer.param_groups, reference.param_groups, strict=True
                ):
                    other |= {"lr": float(group["lr"]), "momentum": group["momentum"]}
                rates.append(
                    (float(optimizer.param_groups[0]["lr"]), optimizer.param_groups[0]["momentum"])
                )
                problem.train(optimizer, 1)
                by_hand.train(reference, 1)
                schedule.step(*([1.0] if scheduler == "plateau" else []))
            assert len(set(rates)) > 1
            assert (len({momentum for _, momentum in rates}) > 1) == (scheduler == "one cycle")
            assert_same(problem.weights(), by_hand.weights(), 1e-12)

    @optims(GSGD_DB)
    def test_compiled_steps_follow_a_tensor_lr(self, device, dtype, optim_info) -> None:  # noqa: ARG002
        """Compiled to graphs that run eagerly, because not every machine has a C++ compiler."""
        problem, eager = (Problem(True, device, torch.float64) for _ in range(2))
        optimizer = GSGD(problem.params, lr=torch.tensor(0.01, dtype=torch.float64), momentum=0.9)
        reference = GSGD(eager.params, lr=0.01, momentum=0.9)
        schedule, by_float = (lr_scheduler.ExponentialLR(o, 0.5) for o in (optimizer, reference))
        step = torch.compile(optimizer.step, backend="aot_eager")
        for _ in range(4):
            problem.backward()
            step()
            schedule.step()
            eager.train(reference, 1)
            by_float.step()
        assert isinstance(optimizer.param_groups[0]["lr"], Tensor)
        assert_same(problem.weights(), eager.weights(), 1e-12)

    @optims(GSGD_DB)
    def test_grad_scaler(self, device, dtype, optim_info) -> None:  # noqa: ARG002
        """Scaled steps equal unscaled ones, as the scale is a power of two.

        A step with an infinity is skipped.
        """
        problem, plain = (Problem(True, device, torch.float32) for _ in range(2))
        optimizer, reference = GSGD(problem.params, lr=0.01), GSGD(plain.params, lr=0.01)
        scaler = torch.amp.GradScaler(torch.device(device).type, init_scale=1024.0)
        for i in range(3):
            before = problem.weights()
            problem.model.zero_grad()
            scaler.scale(problem.loss()).backward()
            if i == 1:
                next(problem.model.parameters()).grad[0] = torch.inf
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(problem.model.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
            if i == 1:
                assert norm.isinf() or norm.isnan()
                assert_same(problem.weights(), before)
                continue
            plain.backward()
            nn.utils.clip_grad_norm_(plain.model.parameters(), 0.5)
            reference.step()
        assert scaler.get_scale() == 512.0

    @optims(GSGD_DB)
    def test_autocast(self, device, dtype, optim_info) -> None:  # noqa: ARG002
        problem = Problem(True, device, torch.float32)
        optimizer = GSGD(problem.params, lr=0.01)
        before = float(problem.loss().detach())
        for _ in range(10):
            problem.model.zero_grad()
            with torch.autocast(torch.device(device).type, torch.bfloat16):
                loss = problem.loss()
            loss.backward()
            optimizer.step()
        assert float(problem.loss().detach()) < before
        assert all(p.dtype == torch.float32 for p in problem.model.parameters())

    @optims(GSGD_DB)
    def test_distributed_checkpoint(self, device, dtype, optim_info) -> None:
        """``torch.distributed.checkpoint`` names states by parameter, and makes them with a step
        without gradients.
        """
        for settings in (one.kwargs for one in optim_info.optim_inputs_func(device=device)):
            problem = Problem(True, device, dtype)
            optimizer = GSGD(problem.params, **settings)
            problem.train(optimizer)
            other = copy.deepcopy(problem)
            resumed = GSGD(other.params, **settings)
            state = copy.deepcopy(get_optimizer_state_dict(problem.model, optimizer))
            before = other.weights()
            set_optimizer_state_dict(other.model, resumed, state)
            assert_same(other.weights(), before)
            problem.train(optimizer)
            other.train(resumed)
            assert_same(other.weights(), problem.weights())

    @optims(GSGD_DB)
    def test_refusals(self, device, dtype, optim_info) -> None:  # noqa: ARG002
        problem = Problem(True, device, dtype)
        plain = nn.Parameter(torch.ones(3, device=device))
        plain.grad = torch.ones(3, device=device).to_sparse()
        with pytest.raises(RuntimeError, match="GSGD does not support sparse gradients"):
            GSGD([plain]).step()
        compiled = torch.compile(problem.model)
        with pytest.raises(
            RecordError,
            match=r"this OptimizedModule has no tensor 0.weight, which its record names",
        ):
            path_parameter_groups(compiled)
        path, *_ = problem.params
        name = path["path"].names[0]
        for kind, message in (
            (
                lambda p: p.to(torch.complex64),
                f"{name} is torch.complex64: path coordinates are real numbers",
            ),
            (
                lambda p: Special(p),
                f"{name} is a Special: GSGD needs whole parameters, not sharded or other special",
            ),
        ):
            odd = [kind(p.detach()).requires_grad_() for p in path["params"]]
            with pytest.raises(PathconvertError, match=message):
                GSGD([path | {"params": odd}])
        optimizer = GSGD(problem.params)
        problem.backward()
        weight = problem.model.get_parameter(name)
        flat = weight.detach().flatten()
        weight.grad = None
        weight.data = flat
        with pytest.raises(
            PathconvertError, match=rf"{name} had the shape \[.*\] and has \[\d+\] now"
        ):
            optimizer.step()


class Special(Tensor):
    """A subclass of Tensor, as DTensor is one."""


instantiate_device_type_tests(TestGSGD, globals(), only_for=("cpu", "cuda"))
