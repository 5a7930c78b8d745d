"""What finetune begins with: a new head where the classes are others, and the source's form."""

from __future__ import annotations

import pytest
import torch
import torchvision
from finetuning import SMALL, begin, command, settings
from trainable import CLASSES, save_images

import pathconvert
from pathconvert.cli import run
from pathconvert.errors import DataError, PathconvertError
from pathconvert.networks.loading import open_network
from pathconvert.training.run import begin as finetune


def test_other_classes_get_a_new_head(weights, tmp_path, capsys):
    data = save_images(tmp_path / "data", 4, 2, ("a", "b", "c", "d", "e"))
    options = (
        "--epochs",
        1,
        "--batch-size",
        4,
        "--device",
        "cpu",
        "--output-dir",
        tmp_path / "run",
    )
    assert run(command("finetune", weights, *SMALL, "--data", data, *options)) == 0
    assert "note: a new classifier for 5 classes: fc.weight, fc.bias" in capsys.readouterr().err
    network = open_network(tmp_path / "run")
    assert network.labels == ("a", "b", "c", "d", "e")
    assert network.model.fc.weight.shape == (5, 8)


def test_more_outputs_than_classes(weights, images, tmp_path):
    made = begin(
        weights, tmp_path / "run", settings(images, num_classes=5, epochs=1, limit_train=8)
    )
    made.train()
    assert open_network(tmp_path / "run").labels == (*CLASSES, "class 3", "class 4")
    with pytest.raises(DataError, match="has 3 classes, more than --num-classes 2"):
        begin(weights, tmp_path / "other", settings(images, num_classes=2))


def test_a_torchvision_network_gets_a_new_head_and_keeps_its_weights(tmp_path, images):
    torch.manual_seed(0)
    stock = torchvision.models.squeezenet1_1(num_classes=7)
    torch.save(stock.state_dict(), tmp_path / "sq.pt")
    network = open_network(tmp_path / "sq.pt")
    chosen = settings(
        images, size="32", limit_train=8, limit_val=3, epochs=1, batch_size=4, lr=1e-5
    )
    made = finetune.begin(network, chosen, tmp_path / "run", device="cpu")
    assert made.prepared.head == ("classifier.1.weight", "classifier.1.bias")
    plain = pathconvert.restore(made.prepared.model, made.prepared.model.path_record)
    for name, tensor in stock.state_dict().items():
        if not name.startswith("classifier.1"):
            # there and back in float32
            assert torch.allclose(plain.state_dict()[name], tensor, rtol=1e-5, atol=2e-6), name
    assert plain.classifier[1].weight.shape == (3, 512, 1, 1)
    assert made.train().best["step"] == 2


@pytest.mark.parametrize("form", ["path", "path-bn"])
def test_a_converted_source_keeps_its_conversion(weights, images, tmp_path, form):
    source = tmp_path / f"s.{form}.safetensors"
    options = (
        ("--calibrate", images / "val" / "red", "--skip-scale", "0.5") if form == "path-bn" else ()
    )
    assert (
        run(
            command(
                "reparam", weights, *SMALL, "--pivot", "max", "--form", form, *options, "-o", source
            )
        )
        == 0
    )
    made = finetune.begin(open_network(source), settings(images), tmp_path / "run", device="cpu")
    record = made.prepared.model.path_record
    assert (record["pivot"], record["path_bn"]["skip_scale"]) == (
        "max",
        0.5 if form == "path-bn" else 1.0,
    )
    assert record["path_bn"]["calibration"]["images"] == (6 if form == "path-bn" else 32)
    with pytest.raises(PathconvertError, match="the source is converted already, with pivot max"):
        finetune.begin(
            open_network(source),
            settings(images, pivot="matching"),
            tmp_path / "other",
            device="cpu",
        )


def test_training_in_path_space_begins_with_the_same_function(weights, images, tmp_path):
    made = begin(weights, tmp_path / "run", settings(images))
    plain = open_network(weights, arch="trainable:Small", input_size=(3, 12, 12)).model
    report = pathconvert.verify(plain, made.prepared.model, torch.randn(4, 3, 12, 12))
    assert report.passed
