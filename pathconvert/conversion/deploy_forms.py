"""Networks with a deploy form, in which branches are merged into one convolution.

RepVGG and MobileOne add a BatchNorm of the activation itself to their convolutions while they are
trained. Such a BatchNorm normalises any factor of its input away, so that the channels that it
reads are pinned. In the deploy form the BatchNorms are gone, and the channels are not pinned.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

#: Methods that bring a module into its deploy form, and who names them so.
METHODS = (
    "switch_to_deploy",  # RepVGG, RepGhost, DiverseBranchBlock
    "reparameterize",  # timm, MobileOne
    "fuse",  # LeViT, RepViT, YOLO
)
#: How ``groups.py`` begins the reason of a channel that a BatchNorm reads.
_READ_BY_BATCH_NORM = "enters the BatchNorm "


def deploy_hint(model: nn.Module, pinned_by: Iterable[str | None]) -> str | None:
    """A sentence about the deploy form of a network, if it has one that would help.

    Args:
        model: the network.
        pinned_by: why each scale group is pinned (:attr:`ScaleGroup.pinned_by`), None for those
            that are not.

    Returns:
        The sentence; None if no channel is pinned by a BatchNorm that reads it, or if the network
        has no deploy form.
    """
    if not any((reason or "").startswith(_READ_BY_BATCH_NORM) for reason in pinned_by):
        return None
    for path, module in model.named_modules():
        for method in METHODS:
            if callable(getattr(module, method, None)):
                return (
                    f"BatchNorms that read an activation pin channels; the network has a deploy"
                    f" form without them ({type(module).__name__}.{method}(), as in"
                    f" {path or 'the network itself'}): bring every such module into it and"
                    " convert the result, if it will not be trained further in this form."
                )
    return None
