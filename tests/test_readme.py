"""The README's examples run as they stand."""

import os
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch

from pathconvert import cli

README = Path(__file__).parent.parent / "README.md"
DATA = os.environ.get("PATHCONVERT_DATA")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)


def test_python_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    (code,) = blocks("python")
    exec(compile(code, str(README), "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    assert "'channels_rescaled': 2880" in printed[0]
    assert printed[-1] == "True"
    assert (tmp_path / "resnet18.path.safetensors").exists()
    assert (tmp_path / "resnet18.onnx").exists()


@pytest.mark.skipif(
    DATA is None, reason="PATHCONVERT_DATA does not name the folder with the real weights"
)
def test_console_examples_print_what_the_readme_shows(tmp_path, monkeypatch, capsys):
    """All but the times, which differ, and the equality, which differs in its digits from processor
    to processor.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    shutil.copy(Path(DATA) / "weights" / "squeezenet1_1.pth", tmp_path)
    shown = "".join(block for block in blocks("console") if block.startswith("$ pathconvert"))
    shutil.copytree(Path(DATA) / "images" / "imagenet20", tmp_path / "photos")
    examples = re.findall(r"^\$ pathconvert (.*)\n((?:(?!\$ ).*\n)*)", shown, re.MULTILINE)
    assert [command.split()[0] for command, _ in examples] == [
        "reparam", "restore", "reparam", "export", "predict", "bench",
    ]  # fmt: skip
    for command, expected in examples:
        assert cli.run(shlex.split(command)) == 0
        printed = capsys.readouterr().out
        if not command.startswith("bench"):  # its numbers are all times
            assert stable(printed) == stable(expected)


def stable(text):
    """Words line by line, without probabilities and without the lines that hold times or errors."""
    lines = [
        [word for word in line.split() if not word.endswith("%")] for line in text.splitlines()
    ]
    varying = ("time", "equality", "largest", "1×3×224×224,")
    return [line for line in lines if line and line[0] not in varying and line[-1] != "relative)"]
