"""Path-SGD: approximate steepest descent in the path norm.

It is from Neyshabur, Salakhutdinov and Srebro, NIPS 2015.

π(w) = Σ Π w² over all paths from an input, or a bias, to an output. A weight's step is divided by
κ, the sum over all paths through it of the product of the other squared weights (their eq. 9,
section 4)::

    w ← w − η · ∂loss/∂w / κ(w)        κ(w) = ∂π / ∂(w²)

π is the network's output for an input of ones if all weights are squared and BatchNorm is left out
(all activations are positive then, so that ReLU changes none). So κ costs one forward and one
backward pass of a single input. Max pooling passes on the largest of its paths. Parameters that no
path goes through (γ, β) take plain steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim.optimizer import Optimizer

from pathconvert.conversion.modules import mode_of
from pathconvert.errors import PathconvertError
from pathconvert.path_bn.layer import PathBN
from pathconvert.training.optimizer.plain import loss_of, require_in_range, step_plain

_BATCH_NORM = nn.modules.batchnorm._BatchNorm


class PathSGD(Optimizer):
    """SGD whose gradients are divided by κ (see the module's docstring).

    For multilayer perceptrons and small CNNs.

    Args:
        model: ReLU network of convolutions and linear layers, with or without BatchNorm or Path-BN.
        input_size: size of one input, such as (3, 32, 32).
        lr, momentum, weight_decay: as in ``torch.optim.SGD``; they apply after the division by κ.

    Raises:
        ValueError: a setting is out of its range.
    """

    def __init__(
        self,
        model: nn.Module,
        input_size: tuple[int, ...],
        lr: float = 0.1,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
    ) -> None:
        require_in_range(lr, momentum, weight_decay)
        self._model, self._input_size = model, input_size
        super().__init__(
            model.parameters(), {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        )

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_model": self._model, "_input_size": self._input_size}

    def path_sums(self) -> dict[str, Tensor]:
        """κ of every weight and bias that a path goes through, float64, by the parameter's name."""
        model = self._model
        norms = {name for name, module in model.named_modules() if isinstance(module, _BATCH_NORM)}
        squared = {
            name: p.detach().double().square().requires_grad_()
            for name, p in model.named_parameters()
            if name.rpartition(".")[0] not in norms
        }
        device = next(model.parameters()).device
        ones = torch.ones(1, *self._input_size, dtype=torch.float64, device=device)
        with mode_of(model, training=False), torch.enable_grad():
            output = functional_call(model, squared | self._neutral(norms), (ones,))
            found = torch.autograd.grad(output.sum(), list(squared.values()), allow_unused=True)
        return {
            name: kappa for name, kappa in zip(squared, found, strict=True) if kappa is not None
        }

    def _neutral(self, norms: set[str]) -> dict[str, Tensor]:
        """Parameters and buffers that turn BatchNorms into the identity.

        Also the squares of Path-BN's pivot factors.
        """
        found: dict[str, Tensor] = {}
        for name in norms:
            bn: Any = self._model.get_submodule(name)
            one, zero = (
                torch.ones_like(bn.running_var, dtype=torch.float64),
                torch.zeros_like(bn.running_var).double(),
            )
            found |= {f"{name}.running_mean": zero, f"{name}.running_var": one - bn.eps}
            found |= {f"{name}.weight": one, f"{name}.bias": zero} if bn.affine else {}
        for name, module in self._model.named_modules():
            if isinstance(module, PathBN):
                found[f"{name}._gain" if name else "_gain"] = module._gain.double().square()
        return found

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step.

        Args:
            closure: computes the loss and its gradients again; None uses the gradients that are
                there.

        Returns:
            The loss that ``closure`` computed; None without it.

        Raises:
            PathconvertError: κ leaves the range of float64, because the network is too deep or too
                wide.
        """
        loss = loss_of(closure)
        kappa = self.path_sums()
        names = {id(p): name for name, p in self._model.named_parameters()}
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            gradients = [self._divided(p, kappa.get(names[id(p)])) for p in params]
            step_plain(params, gradients, group, self.state)
        return loss

    def _divided(self, p: Tensor, kappa: Tensor | None) -> Tensor:
        """∂loss/∂w / κ; 0 where no path goes through w."""
        grad = cast(Tensor, p.grad)
        if kappa is None:
            return grad
        if not bool(torch.isfinite(kappa).all()):
            raise PathconvertError(
                f"the path norm of this {type(self._model).__name__} leaves the range of float64",
                "Path-SGD is meant for multilayer perceptrons and small CNNs; use --optimizer"
                " gsgd.",
            )
        return torch.where(kappa > 0, grad / kappa, 0.0).to(grad.dtype)
