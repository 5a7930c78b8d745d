"""The plan of a run, which ``finetune --dry-run`` prints."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pathconvert.networks.inputs import random_input
from pathconvert.path_bn.layer import PathBN
from pathconvert.training.optimizer.gsgd import GSGD
from pathconvert.training.run.loop import Run
from pathconvert.training.run.preparation import Prepared


def plan(run: Run) -> dict[str, Any]:
    """The plan of a training run, as JSON.

    It holds the numbers of parameters, chains, pivots, images and steps, and the memory that
    training needs.
    """
    model, settings = run.prepared.model, run.settings
    optimizer = run.learner.raw_optimizer
    named = dict(model.named_parameters())
    kinds = {"frozen": sum(p.numel() for p in named.values() if not p.requires_grad)}
    chains: dict[str, Any] = {}
    layers = [module for module in model.modules() if isinstance(module, PathBN)]
    pivots = sum(len(layer.pivot_row) for layer in layers)
    if isinstance(optimizer, GSGD) and optimizer.chains:
        found = optimizer.chains[0]
        pivots += sum(len(tensor.skeleton) for tensor in found.tensors.values())
        trained = {
            name: tensor for name, tensor in found.tensors.items() if named[name].requires_grad
        }
        starts = [name for name in found.parameter if named[name].requires_grad]
        fixed = sum(len(tensor.skeleton) for tensor in trained.values())
        on_chains = (
            sum(named[name].numel() for name in trained)
            - fixed
            - sum(name in trained for name in starts)
        )
        kinds |= {"on chains": on_chains, "starts": len(starts), "pivots that do not move": fixed}
        chains = {
            "start": found.start,
            "chains": found.count,
            "units": found.units,
            "left": dict(found.left),
        }
    kinds["ordinary"] = sum(p.numel() for p in named.values()) - sum(kinds.values())
    local_batch = max(1, settings.batch_size // run.fabric.world_size)
    return {
        "form": run.prepared.form,
        "parameters": kinds,
        "chains": chains,
        "path_bn_layers": len(layers),
        "pivots": pivots,
        "train_images": len(run.data.train),
        "val_images": len(run.data.val),
        "classes": len(run.data.classes),
        "steps": run.total_steps,
        "epochs": -(-run.total_steps // run.steps_per_epoch),
        "device": str(run.fabric.device),
        "memory_bytes": _memory(
            run.prepared, local_batch, momentum=bool(settings.momentum), average=bool(settings.ema)
        ),
        "notes": list(run.prepared.notes),
    }


def _memory(prepared: Prepared, batch: int, *, momentum: bool, average: bool) -> dict[str, int]:
    """Bytes of the weights and of the activations.

    Gradients and buffers count with the weights; the activations are those kept for the backward
    pass.
    """
    model = prepared.model
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    kept = _kept_by_autograd(prepared, model) * batch
    return {"weights": weights * (1 + average) + trained * (1 + momentum), "activations": kept}


def _kept_by_autograd(prepared: Prepared, model: nn.Module) -> int:
    """Bytes that autograd keeps per image, without parameters and buffers.

    Measured with a batch of two images.
    """
    own = {p.data_ptr() for p in model.parameters()} | {b.data_ptr() for b in model.buffers()}
    seen: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    example = random_input(prepared.network.architecture, batch=2).to(
        next(model.parameters()).device
    )
    state = {name: tensor.clone() for name, tensor in model.named_buffers()}
    training = model.training
    try:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            model.train()(example)
    finally:
        model.train(training)
        for name, tensor in model.named_buffers():
            tensor.copy_(state[name])
    return sum(seen.values()) // 2
