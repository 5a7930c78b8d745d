"""Networks with a deploy form, in which branches are merged into one convolution.

RepVGG and MobileOne add a BatchNorm of the activation itself to their convolutions while they are
trained. Its running statistics carry the factors of the channels that it reads (``carrying.py``),
but it takes no Path-BN form, and the branches take time. In the deploy form they are one
convolution, which is a usual layer.
"""

from __future__ import annotations

from pathconvert.conversion.groups import READ_BY_BATCH_NORM
from pathconvert.conversion.reparameterize import Conversion

#: Methods that bring a module into its deploy form, and who names them so.
METHODS = (
    "switch_to_deploy",  # RepVGG, RepGhost, DiverseBranchBlock
    "reparameterize",  # timm, MobileOne
    "fuse",  # LeViT, RepViT, YOLO
)


def deploy_hint(conversion: Conversion) -> str | None:
    """A sentence about the deploy form of a network, if BatchNorms read its activations.

    Returns:
        The sentence; None if no BatchNorm reads a channel that layers read as well, or if the
        network has no deploy form.
    """
    reasons = [group.pinned_by or "" for group in conversion.units.groups]
    if not any(slot.statistic for slot in conversion.units.slots) and not any(
        reason.startswith(READ_BY_BATCH_NORM) for reason in reasons
    ):
        return None
    for path, module in conversion.model.named_modules():
        for method in METHODS:
            if callable(getattr(module, method, None)):
                return (
                    "BatchNorms beside convolutions read activations here; the network has a"
                    f" deploy form without them ({type(module).__name__}.{method}(), as in"
                    f" {path or 'the network itself'}): bring every such module into it and"
                    " convert the result, if it will not be trained further in this form."
                )
    return None
