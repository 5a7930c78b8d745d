"""The changed classifiers of a file: which layers they have, and what has to be asked of them."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.conv import _ConvNd

from pathconvert.errors import ArchitectureError
from pathconvert.networks import architectures, heads, resizing
from pathconvert.networks.architectures import Shapes
from pathconvert.networks.builders import classifier_of, head_place
from pathconvert.networks.search import Question, Search, below, counted, shapes_in

#: What a classifier such as ``fc.1`` leaves open: the place in front of it has no tensors.
ASSUMED_DROPOUT = (
    "; that it is a Dropout which stands in front, and that nothing follows, is assumed, as the"
    " file cannot tell"
)


def find_head(search: Search) -> bool:
    """The classifier, where it has other layers than the stock network's."""
    root = classifier_of(search.model)
    if root is None and not search.given.keys() & {"head", "head_at"}:
        return True
    root = head_place(search.model, search.name, None)
    found, own = below(root, search.shapes), below(root, shapes_in(search.model))
    if found.keys() == own.keys() and "head" not in search.given:
        return _pooling(search, root)
    place = _place(search, root, found, own)
    if "head_at" in search.given:
        place = head_place(search.model, search.name, search.given["head_at"])
    features = heads.features_of(search.model.get_submodule(place))
    if _find_concatenation(search, place, features):
        features *= 2
    layers = heads.read(below(place, search.shapes), features)
    if layers is None:
        return False
    head = _named_head(search, place, layers, features)
    if head is None:
        return False
    resizing.replace(search.model, place, heads.build(head, features))
    search.arguments["head"] = heads.text_of(head)
    if place != root:
        search.arguments["head_at"] = place
    search.arguments.pop("num_classes", None)
    if heads.outputs_of(head) is not None:
        search.arguments["num_classes"] = heads.outputs_of(head)
    note = _head_note(place, head, search.model.get_submodule(place))
    if heads.Layer("dropout") in head and "head" not in search.given:
        note += ASSUMED_DROPOUT
    search.notes.append(note)
    return _pooling(search, root)


def _find_concatenation(search: Search, place: str, features: int) -> bool:
    """Whether the classifier reads fastai's pooling: twice as many features."""
    if not resizing.pools_to_one(search.model):
        return False
    weights = (s for n, s in below(place, search.shapes).items() if n.endswith("weight"))
    if search.given.get("avgpool") != "concat":
        pooled = next(weights, (0,))[-1] == 2 * _last_channels(search.model, search.shapes)
        if not pooled or features != _last_channels(search.model, search.shapes):
            return False
        search.questions.append(
            Question(
                f"its classifier reads {2 * features} features instead of {features}, and how they"
                " are pooled is not in the file",
                {"avgpool": "concat"},
                "avgpool=concat is fastai's pooling: the maximum of every channel, then the mean",
            )
        )
    search.arguments["avgpool"] = "concat"
    resizing.set_avgpool(search.model, "concat")
    search.notes.append("its features are the maximum and the mean of every channel")
    return True


def _place(search: Search, root: str, found: Shapes, own: Shapes) -> str:
    """The module that was replaced: the whole classifier, or only its last layer."""
    last: str = architectures.index()[search.name]["head"][0].rpartition(".")[0]
    if last == root:
        return root
    inner = last.removeprefix(f"{root}.") + "."
    rest = {name for name in found if not name.startswith(inner)}
    if len(rest) < len(found) and rest == {n for n in own if not n.startswith(inner)}:
        return last
    convolution = isinstance(search.model.get_submodule(last), nn.Conv2d)  # SqueezeNet's
    if not found and convolution and "head" not in search.given:
        search.questions.append(
            Question(
                f"{last} is missing, and whether the features are pooled without it is not in"
                " the file",
                {"head": "identity", "head_at": last},
                "That pools them; without head_at they are not pooled",
            )
        )
        return last
    return root


def _named_head(search: Search, place: str, found: heads.Head, features: int) -> heads.Head | None:
    """The head with these layers: as the user says, as they show, or as it is asked for."""
    layers = ", ".join(f"{place}.{layer.name}".rstrip(".") for layer in found)
    proposed = heads.suggestion(found, search.arguments.get("avgpool") == "concat")
    if "head" in search.given:
        head = heads.filled(heads.parse(search.given["head"]), found)
        if head is None:
            raise ArchitectureError(
                f"{search.name}: the head {search.given['head']!r} does not have its weights"
                f" where the file has them ({layers or 'nowhere'})",
                "Name every layer, those without weights too, for example --arch"
                f" '{search.call({'head': heads.text_of(proposed) or 'identity'})}'",
            )
        return head
    head = heads.complete(found)
    if head is not None and not heads.may_stand_side_by_side(found, features):
        return head
    shown = heads.text_of(proposed)
    search.questions.append(
        Question(
            f"the classifier has its weights in {layers}, and which activations stand between"
            " or behind them is not in the file",
            {"head": shown},
            "Write the layers that it has; the kinds are linear, batchnorm,"
            f" {', '.join(heads.PLAIN)}",
        )
    )
    return heads.filled(proposed, found)


def _pooling(search: Search, root: str) -> bool:
    """The size of the feature map that a VGG's or AlexNet's classifier reads."""
    side = resizing.pooled_side(search.model)
    linear = next((n for n in below(root, search.shapes) if n.endswith("weight")), None)
    if search.arguments.get("avgpool") == "concat":
        return True
    if "avgpool" in search.given:
        resizing.set_avgpool(search.model, search.given["avgpool"])
        search.arguments["avgpool"] = search.given["avgpool"]
        grid = f"{search.given['avgpool']}×{search.given['avgpool']}"
        search.notes.append(f"its features are averaged to a {grid} map")
        return True
    if side is None or linear is None:
        return True
    channels = _last_channels(search.model, search.shapes)
    area, rest = divmod(search.shapes[f"{root}.{linear}"][-1], channels)
    new = round(area**0.5)
    if rest or new * new != area:
        return False
    if new != side:
        search.arguments["avgpool"] = new
        text = (
            f"its classifier reads a {new}×{new} feature map instead of {side}×{side}, and how"
            " the features are pooled to that size is not in the file"
        )
        hint = f"avgpool={new} averages them"
        search.questions.append(Question(text, {"avgpool": new}, hint))
    return True


def has_classes(search: Search, num_classes: int | None) -> bool:
    """Whether a new head has the number of classes that the user named."""
    if num_classes is None or "head" not in search.arguments:
        return True
    return heads.outputs_of(heads.parse(search.arguments["head"])) == num_classes


def _last_channels(model: nn.Module, shapes: Shapes) -> int:
    """The number of channels of a network's last convolution, in the file."""
    names = [n for n, module in model.named_modules() if isinstance(module, _ConvNd)]
    return shapes.get(f"{names[-1]}.weight", (1,))[0]


def _head_note(place: str, head: heads.Head, module: nn.Module) -> str:
    """What a head is, in a sentence."""
    if head == (heads.Layer("identity"),):
        return f"it has no classifier: its outputs are the features that {place} would read"
    linear = [layer for layer in head if layer.kind == "linear"]
    outputs = counted(linear[-1].outputs or 0, "output") if linear else "the features as outputs"
    classes = [type(child).__name__ for child in module.children()] or [type(module).__name__]
    kind = f"Sequential({', '.join(classes)})" if isinstance(module, nn.Sequential) else classes[0]
    without = " without a bias" if kind == "Linear" and not head[-1].bias else ""
    return f"its classifier {place} is a {kind}{without} with {outputs}"
