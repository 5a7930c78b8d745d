"""``--mean --std --size --resize --interpolation --labels`` on every command that touches images.

What was given is recorded, and the next command uses it.
"""

# ruff: noqa: ARG001 - fixtures are asked for what they do: `here` is the current folder

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from command_line import header
from finetuning import SMALL
from onnx_files import save_linear
from PIL import Image
from sample_networks import network
from torchvision.models import RegNet_X_400MF_Weights
from trainable import CLASSES, Small, save_images, save_network

from pathconvert.cli import app, run
from pathconvert.networks.images import read_image
from pathconvert.networks.loading import open_network
from pathconvert.networks.preprocessing import Preprocessing, whole_levels

FLAGS = (
    *("--mean", "0.5", "--std", "0.25,0.5,1", "--size", "10x12"),
    *("--resize", "16", "--interpolation", "bicubic"),
)
GIVEN = Preprocessing(16, (10, 12), (0.5,) * 3, (0.25, 0.5, 1.0), "bicubic")
LABELS = ("sea", "wood", "fire")
TAKING = ("reparam", "verify", "export", "predict", "evaluate", "finetune")


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A current folder with a small network, labelled images, ``photos/`` and ``labels.txt``."""
    save_network(tmp_path / "n.pt")
    save_images(tmp_path / "data", 4, 2)
    (tmp_path / "labels.txt").write_text("\n".join(LABELS) + "\n")
    (tmp_path / "photos").mkdir()
    for i, shape in enumerate(((20, 30, 3), (16, 16, 3), (40, 11, 3))):
        pixels = np.random.default_rng(i).integers(0, 256, shape).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def result(capsys, *arguments: object) -> dict:
    """What a command prints with ``--json``; the lines on stderr are kept as ``notes_printed``."""
    capsys.readouterr()
    assert run([*map(str, arguments), "--json"]) == 0
    printed = capsys.readouterr()
    return json.loads(printed.out) | {"notes_printed": printed.err.splitlines()}


def as_json(recipe: Preprocessing) -> dict:
    return json.loads(json.dumps(dataclasses.asdict(recipe)))


def inputs(recipe: Preprocessing) -> torch.Tensor:
    """The photos as the recipe prepares them."""
    photos = sorted(Path("photos").iterdir())
    placed = [recipe.place(whole_levels(read_image(path).pixels)) for path in photos]
    return recipe.normalise(torch.stack(placed))


def probabilities(found: dict) -> np.ndarray:
    """The probabilities of a prediction in the order of the outputs, [images, classes]."""
    rows = [{g["index"]: g["probability"] for g in p["classes"]} for p in found["predictions"]]
    return np.array([[row[i] for i in range(len(row))] for row in rows])


# ---- which commands ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TAKING)
def test_every_command_that_touches_images_takes_them(name):
    command = typer.main.get_command(app).commands[name]
    options = {option for parameter in command.params for option in parameter.opts}
    assert options >= {"--mean", "--std", "--size", "--resize", "--interpolation", "--labels"}


def test_every_command_that_takes_a_key_takes_a_prefix():
    for name, command in typer.main.get_command(app).commands.items():
        options = {option for parameter in command.params for option in parameter.opts}
        assert ("--key" in options) == ("--prefix" in options), name


def test_a_prefix_chooses_one_of_two_networks(here, capsys):
    parts = {"teacher.": Small(), "student.net.": Small()}
    named = [(p, name, t) for p, m in parts.items() for name, t in m.state_dict().items()]
    torch.save({prefix + name: tensor for prefix, name, tensor in named}, "two.pt")
    for prefix, model in parts.items():
        torch.save(model.state_dict(), "one.pt")
        flags = ("photos", *SMALL, "--device", "cpu")
        alone = probabilities(result(capsys, "predict", "one.pt", *flags))
        found = probabilities(result(capsys, "predict", "two.pt", *flags, "--prefix", prefix))
        assert np.array_equal(found, alone)


# ---- given, recorded, used again -----------------------------------------------------------------


def test_what_was_given_is_recorded_and_used_by_the_next_commands(here, capsys):
    labels = ("--labels", "labels.txt")
    result(capsys, "reparam", "n.pt", "--arch", "trainable:Small", *FLAGS, *labels)
    stored = header(Path("n.path.safetensors"))
    assert (stored["preprocessing"], stored["labels"]) == (as_json(GIVEN), list(LABELS))
    assert stored["architecture"]["input_size"] == [3, 10, 12]
    result(capsys, "reparam", "n.path.safetensors", "--form", "path-bn", "--calibrate", "photos")
    exported = result(capsys, "export", "n.path-bn.safetensors", "-o", "n.onnx")
    assert exported["card"]["preprocessing"] == as_json(GIVEN)
    assert exported["card"]["labels"] == list(LABELS)
    with torch.no_grad():
        expected = open_network("n.path.safetensors").model(inputs(GIVEN)).softmax(1).numpy()
    for source in ("n.path.safetensors", "n.path-bn.safetensors", "n.onnx"):
        found = result(capsys, "predict", source, "photos", "--device", "cpu")
        assert found["preprocessing"] == as_json(GIVEN)
        assert {g["label"] for g in found["predictions"][0]["classes"]} == set(LABELS)
        # engines round differently in float32
        assert np.allclose(probabilities(found), expected, atol=1e-5), source
        assert not any("no preprocessing" in line for line in found["notes_printed"])


def test_one_option_leaves_the_others_as_they_are(here, capsys):
    result(capsys, "reparam", "n.pt", "--arch", "trainable:Small", *FLAGS)
    source = "n.path.safetensors"
    found = result(capsys, "predict", source, "photos", "--std", "0.5", "--device", "cpu")
    assert found["preprocessing"] == as_json(dataclasses.replace(GIVEN, std=(0.5,) * 3))
    found = result(capsys, "predict", source, "photos", "--size", "20x24", "--device", "cpu")
    assert found["preprocessing"] == as_json(GIVEN.at((20, 24)))
    assert found["preprocessing"]["resize"] == 32
    result(
        capsys, "reparam", source, "--form", "path-bn", "--mean", "0.1", "--labels", "labels.txt"
    )
    stored = header(Path("n.path-bn.safetensors"))
    assert stored["preprocessing"] == as_json(dataclasses.replace(GIVEN, mean=(0.1,) * 3))
    assert stored["labels"] == list(LABELS)


def test_nothing_is_recorded_if_nothing_was_given(here, capsys):
    result(capsys, "reparam", "n.pt", *SMALL)
    assert not {"preprocessing", "labels"} & header(Path("n.path.safetensors")).keys()


def test_prediction_and_evaluation_of_a_checkpoint(here, capsys):
    named = ("--arch", "trainable:Small")
    model = Small()
    model.load_state_dict(torch.load("n.pt"))
    with torch.no_grad():
        expected = model.eval()(inputs(GIVEN)).softmax(1).numpy()
    given = (*named, *FLAGS, "--labels", "labels.txt", "--device", "cpu")
    found = result(capsys, "predict", "n.pt", "photos", *given)
    assert np.allclose(probabilities(found), expected, atol=1e-5)
    assert not any("no preprocessing" in line for line in found["notes_printed"])
    plain = result(capsys, "evaluate", "n.pt", "--data", "data", *SMALL, "--device", "cpu")
    prepared = result(capsys, "evaluate", "n.pt", "--data", "data", *given)
    assert plain["loss"] != prepared["loss"]
    assert (
        "note: no preprocessing is recorded: images are resized to 12×12 and scaled to [0, 1],"
        in (" ".join(plain["notes_printed"]))
    )
    assert prepared["notes_printed"][:1] == [
        "note: the network has no class 'blue', so the data's classes were matched by position"
    ]
    result(capsys, "reparam", "n.pt", *named, *FLAGS)
    again = result(capsys, "evaluate", "n.path.safetensors", "--data", "data", "--device", "cpu")
    assert again["loss"] == pytest.approx(prepared["loss"], rel=1e-5)  # rounding in float32


def test_labels_tell_which_class_is_which_output(here, capsys):
    """The data's classes are sorted by name; the network's are in the order of ``--labels``."""
    Path("turned.json").write_text(json.dumps(CLASSES[::-1]))
    common = ("evaluate", "n.pt", "--data", "data", *SMALL, "--device", "cpu")
    in_order = result(capsys, *common)
    turned = result(capsys, *common, "--labels", "turned.json")
    assert turned["loss"] != in_order["loss"]
    assert not any("by position" in line for line in turned["notes_printed"])


def test_an_onnx_file_without_a_card_is_told_how_images_are_prepared(here, capsys):
    weight = save_linear(here / "l.onnx")
    flags = ("--mean", "0.5", "--std", "0.25", "--resize", "6", "--device", "cpu")
    found = result(capsys, "predict", "l.onnx", "photos", *flags)
    recipe = Preprocessing(6, (4, 4), (0.5,) * 3, (0.25,) * 3)
    assert found["preprocessing"] == as_json(recipe)
    scores = torch.from_numpy(inputs(recipe).mean((2, 3)).numpy() @ weight)
    assert np.allclose(probabilities(found), scores.softmax(1), atol=1e-5)  # float32
    assert not any("no preprocessing" in line for line in found["notes_printed"])


def test_the_graph_normalises_as_given(here, capsys):
    flags = ("--mean", "0.5", "--std", "0.25,0.5,1")
    result(capsys, "export", "n.pt", "-o", "n.onnx", *SMALL, *flags, "--with-preprocessing")
    in_graph = result(capsys, "predict", "n.onnx", "photos", "--device", "cpu")
    outside = result(capsys, "predict", "n.pt", "photos", *SMALL, *flags, "--device", "cpu")
    assert np.allclose(probabilities(in_graph), probabilities(outside), atol=1e-5)  # float32


def test_a_graph_cannot_normalise_without_them(refused, here):
    """The tip works when it is followed."""
    common = ("export", "n.pt", "-o", "n.onnx", *SMALL, "--with-preprocessing")
    error, tip = refused(*common)
    assert error == (
        "error: the preprocessing of trainable:Small is not known, so it cannot go into the graph"
    )
    assert tip == "tip: Give it, such as --mean 0.5 --std 0.5, or leave --with-preprocessing out."
    assert run([*common, *re.search(r"--mean \S+ --std [\d.]+", tip)[0].split()]) == 0


def test_images_that_networks_are_compared_on(here, capsys, monkeypatch):
    from pathconvert.networks import checked

    seen = []
    load = checked.load_images

    def watched(paths, architecture, recipe):
        seen.append(recipe)
        return load(paths, architecture, recipe)

    monkeypatch.setattr(checked, "load_images", watched)
    given = ("--images", "photos", "--arch", "trainable:Small", *FLAGS)
    assert result(capsys, "verify", "n.pt", "n.pt", *given)["notes_printed"] == []
    assert seen == [GIVEN]
    found = result(capsys, "verify", "n.pt", "n.pt", "--images", "photos", *SMALL)
    assert found["notes_printed"] == [
        "note: no preprocessing is recorded: images are scaled to [0, 1], not normalised"
    ]


def test_finetune_records_them(here, capsys):
    options = (*("--data", "data", "--epochs", 1, "--batch-size", 4), "--device", "cpu")
    given = (*FLAGS, "--labels", "labels.txt", "--output-dir", "run")
    found = result(capsys, "finetune", "n.pt", "--arch", "trainable:Small", *given, *options)
    stored = header(Path(found["network"]))
    assert (stored["preprocessing"], stored["labels"]) == (as_json(GIVEN), list(LABELS))
    config = Path("run/config.yaml").read_text()
    assert "resize: '16'\n" in config
    assert "interpolation: bicubic\nlabels: labels.txt\n" in config
    again = result(capsys, "predict", found["network"], "photos", "--device", "cpu")
    assert again["preprocessing"] == as_json(GIVEN)


# ---- which of torchvision's weights --------------------------------------------------------------


@pytest.fixture
def regnet(here) -> Path:
    """A file for which torchvision has two sets of weights, with different preprocessing."""
    torch.save(network("regnet_x_400mf", num_classes=1000).state_dict(), "r.pt")
    return Path("r.pt")


ASSUMED = (
    "note: r.pt is none of torchvision's files for regnet_x_400mf, so images are prepared as for"
    " IMAGENET1K_V2 (--resize 66); IMAGENET1K_V1 expects --resize 73"
)


def test_the_assumption_is_said_where_images_are_touched(regnet, capsys, monkeypatch):
    size = ("--input-size", "3x64x64")
    common = ("r.pt", "photos", "--device", "cpu", *size)
    found = result(capsys, "predict", *common)
    assert found["notes_printed"] == [ASSUMED]
    assert found["preprocessing"]["resize"] == 66
    assert result(capsys, "predict", *common, "--resize", "73")["notes_printed"] == []
    assert ASSUMED in result(capsys, "export", "r.pt", "-o", "r.onnx", *size)["notes_printed"]
    quiet = result(capsys, "reparam", "r.pt", *size, "--scope", "block")["notes_printed"]
    assert not any("none of torchvision's files" in line for line in quiet)
    found = result(capsys, "predict", "r.path.safetensors", "photos", "--device", "cpu")
    assert found["notes_printed"] == [
        ASSUMED.replace("note: r.pt", "note: the source of r.path.safetensors")
    ]


def test_identified_weights_bring_their_own_preprocessing(regnet, capsys, monkeypatch):
    digits = open_network(regnet).checkpoint.sha256[:8]
    v1 = RegNet_X_400MF_Weights.IMAGENET1K_V1
    url = re.sub("-[0-9a-f]{8}.pth", f"-{digits}.pth", v1.url)
    real = dataclasses.replace(v1.value, url=url)
    monkeypatch.setattr(v1, "_value_", real)
    size = ("--input-size", "3x64x64")
    found = result(capsys, "predict", "r.pt", "photos", "--device", "cpu", *size)
    assert (found["preprocessing"]["resize"], found["notes_printed"]) == (73, [])
    assert found["predictions"][0]["classes"][0]["label"] in v1.meta["categories"]
    # the converted file names its source's SHA-256
    result(capsys, "reparam", "r.pt", *size)
    found = result(capsys, "predict", "r.path.safetensors", "photos", "--device", "cpu")
    assert (found["preprocessing"]["resize"], found["notes_printed"]) == (73, [])


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "lines"),
    [
        (
            ("--std", "0"),
            [
                "error: --std must be positive, not 0",
                "tip: Give positive numbers, such as --std 0.25",
            ],
        ),
        (
            ("--std", "0.1,-1,2"),
            [
                "error: --std must be positive, not -1",
                "tip: Give positive numbers, such as --std 0.25",
            ],
        ),
        (
            ("--mean", "nan"),
            [
                "error: --mean nan is out of range",
                "tip: Give values for pixels in [0, 1], such as --mean 0.5",
            ],
        ),
        (
            ("--mean", "0.5;0.5"),
            [
                "error: --mean '0.5;0.5' is not a list of numbers",
                "tip: Give one number, or one per channel: --mean 0.5",
            ],
        ),
        (
            ("--mean", "0.1,0.2"),
            [
                "error: --mean has 2 values for 3 channels",
                "tip: Give one value, or 3.",
            ],
        ),
        (
            ("--size", "0"),
            [
                "error: --size '0' is not a size",
                "tip: Give height and width, or one number for both: --size 224",
            ],
        ),
        (
            ("--size", "8"),
            ["error: --size 8x8 and --input-size 3x12x12 differ", "tip: Give one of them."],
        ),
        (
            ("--resize", "-3"),
            [
                "error: --resize '-3' is not a size",
                "tip: Give height and width, or one number for both: --resize 224",
            ],
        ),
        (
            ("--labels", "two.txt"),
            [
                "error: --labels has 2 names, but trainable:Small has 3 outputs",
                "tip: Give one name per output, in the order of the outputs.",
            ],
        ),
        (
            ("--labels", "none.txt"),
            [
                "error: none.txt cannot be read as labels: No such file or directory",
                "tip: Give a file with one name per line, or a JSON list: --labels classes.txt",
            ],
        ),
    ],
)
def test_values_that_make_no_sense(refused, here, flags, lines):
    Path("two.txt").write_text("a\nb\n")
    for command in (
        ("reparam", "n.pt"),
        ("verify", "n.pt", "n.pt", "--images", "photos"),
        ("export", "n.pt", "-o", "x.onnx"),
    ):
        assert refused(*command, *SMALL, *flags) == lines
    named = [line.replace("trainable:Small", "n.pt") for line in lines]
    for command in (("predict", "n.pt", "photos"), ("evaluate", "n.pt", "--data", "data")):
        assert refused(*command, *SMALL, *flags, "--device", "cpu") == named


@pytest.mark.parametrize(
    "wrong",
    [
        *(("--std", "0"), ("--mean", "nan"), ("--mean", "x"), ("--size", "0"), ("--resize", "x")),
        ("--labels", "none.txt"),
    ],
)
def test_tips_work_when_pasted(refused, here, capsys, wrong):
    Path("labels.txt").rename("classes.txt")
    common = ("reparam", "n.pt", "--arch", "trainable:Small", "--size", "12")
    tip = refused(*common, *wrong)[1]
    option, value = re.search(r"(--\w+) (\S+)$", tip).groups()
    assert option == wrong[0]
    assert run([*common, option, value]) == 0


def test_what_finetune_refuses(refused, here):
    Path("two.txt").write_text("a\nb\n")
    common = (
        "finetune",
        "n.pt",
        *SMALL,
        "--data",
        "data",
        "--output-dir",
        "run",
        "--device",
        "cpu",
    )
    assert refused(*common, "--std", "0")[0] == "error: --std must be positive, not 0"
    assert refused(*common, "--labels", "two.txt") == [
        "error: --labels has 2 names, but the network to train has 3 outputs",
        "tip: Give one name per output, in the order of the outputs.",
    ]


def test_networks_that_take_no_images(refused, here):
    torch.save(network("r3d_18").state_dict(), "video.pt")
    for flags in (("--mean", "0"), ("--size", "8"), ("--interpolation", "bicubic")):
        assert refused("export", "video.pt", "-o", "v.onnx", *flags) == [
            f"error: {flags[0]} is for images, but r3d_18 takes inputs of size 3x16x112x112",
            f"tip: Leave {flags[0]} out.",
        ]


def test_labels_need_a_network_that_runs(refused, here, capsys):
    torch.save(network("squeezenet1_1", num_classes=3).half().state_dict(), "half.pt")
    common = ("reparam", "half.pt", "--labels", "labels.txt", "--input-size")
    error, tip = refused(*common, "3x8x8")
    assert error.startswith("error: squeezenet1_1 cannot run on inputs of size 3x8x8: ")
    assert tip == "tip: Give another --input-size."
    result(capsys, *common, "3x64x64")
    assert header(Path("half.path.safetensors"))["labels"] == list(LABELS)


def test_options_without_effect(refused, here):
    assert refused("verify", "n.pt", "n.pt", *SMALL, "--mean", "0") == [
        "error: --mean has no effect without images",
        "tip: Add --images DIR.",
    ]
    torch.save(network("lraspp_mobilenet_v3_large").state_dict(), "seg.pt")
    assert refused("export", "seg.pt", "-o", "s.onnx", "--resize", "64") == [
        "error: --resize has no effect on lraspp_mobilenet_v3_large: its images are not cropped,"
        " but brought to the input's size",
        "tip: Give --size instead.",
    ]
