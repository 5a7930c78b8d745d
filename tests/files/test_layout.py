"""A file is written in the layout that another one had."""

from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from checkpoint_files import Net, assert_same

from pathconvert.files.layout import Layout
from pathconvert.files.writing import write_checkpoint


def test_keys_names_and_counters_come_back(tmp_path: Path, net: Net) -> None:
    layout = Layout(
        container="torch",
        key=("ema", "state_dict"),
        prefix="module.",
        names={"0.weight": "module.first.weight"},
        counters={"module.1.num_batches_tracked": ("float32", (1,))},
    )
    layout = Layout.from_json(layout.to_json())
    path = write_checkpoint(tmp_path / "a.ckpt", net.state_dict(), None, layout=layout)
    state = torch.load(path, weights_only=True)["ema"]["state_dict"]
    assert isinstance(state, OrderedDict)
    counter = state["module.1.num_batches_tracked"]
    assert (counter.dtype, tuple(counter.shape)) == (torch.float32, (1,))
    assert list(state)[:2] == ["module.first.weight", "module.0.bias"]
    back = layout.read_back(state)
    assert_same(back, net.state_dict())


@pytest.mark.parametrize("name", ["a.pt", "a.pth", "a.ckpt", "a.bin", "a.pth.tar"])
@pytest.mark.parametrize("container", ["torch", "torch-legacy"])
def test_every_suffix_of_torch_save(tmp_path: Path, net: Net, name: str, container: str) -> None:
    layout = Layout(container=container)
    path = write_checkpoint(tmp_path / name, net.state_dict(), None, layout=layout)
    assert (path.read_bytes()[:2] == b"PK") == (container == "torch")
    net.load_state_dict(torch.load(path, weights_only=True))


@pytest.mark.parametrize(
    "damage", [{"container": "tar"}, {"counters": {"a": ["save", []]}}, {"key": None}]
)
def test_damaged_layouts_are_not_read(damage: dict) -> None:
    with pytest.raises((KeyError, TypeError, ValueError)):
        Layout.from_json(Layout().to_json() | damage)
