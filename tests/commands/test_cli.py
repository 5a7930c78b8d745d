"""The process around the commands: exit codes, help, ends from outside, tracebacks."""

# ruff: noqa: ARG001 - fixtures are asked for what they do: `here` is the current folder

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import SMALL

from pathconvert.cli import run

COMMANDS = (
    "reparam",
    "restore",
    "export",
    "verify",
    "inspect",
    "bench",
    "predict",
    "evaluate",
    "archs",
    "demo",
)
KILLED = """
import os, sys
from pathconvert.networks import checked
from pathconvert.cli import run
checked.verify_conversion = lambda *_: os.kill(os.getpid(), 9)
run(sys.argv[1:])
"""


def process(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        timeout=120,
        env=os.environ | environment,
        check=False,
    )


@pytest.mark.parametrize("existed", [True, False])
def test_kill_before_the_file_has_its_name(here, existed):
    if existed:
        Path("x.pt").write_bytes(b"old")
    done = process("-c", KILLED, "reparam", "sq.pt", "-o", "x.pt", "--force", *SMALL)
    assert done.returncode == -signal.SIGKILL
    assert Path("x.pt").exists() == existed
    assert not existed or Path("x.pt").read_bytes() == b"old"


def test_a_job_managers_end_leaves_no_temporary_file(here):
    ends = (
        KILLED.replace("os.getpid(), 9", "os.getpid(), 15")
        .replace("import run", "import main")
        .replace("run(sys.argv[1:])", "main()")
    )
    done = process("-c", ends, "reparam", "sq.pt", *SMALL)
    assert done.returncode == 128 + signal.SIGTERM
    assert os.listdir(here) == ["sq.pt"]


def test_a_terminal_without_arrows(here):
    done = process("-m", "pathconvert.cli", "reparam", "sq.pt", *SMALL, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"sq.pt ? sq.path.safetensors" in done.stdout


def test_help_loads_no_torch():
    code = (
        "import sys; from pathconvert.cli import run; run(sys.argv[1:]); assert 'torch' not in"
        " sys.modules"
    )
    for arguments in (["--help"], ["reparam", "--help"], ["--version"]):
        assert process("-c", code, *arguments).returncode == 0


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command, capsys):
    assert run([command, "--help"]) == 0
    assert f": pathconvert {command}" in " ".join(capsys.readouterr().out.split())


def test_completion_of_commands():
    environment = {
        "_PATHCONVERT_COMPLETE": "complete_bash",
        "COMP_WORDS": "pathconvert re",
        "COMP_CWORD": "1",
    }
    code = "from pathconvert.cli import main; main()"
    assert process("-c", code, **environment).stdout.split() == [b"reparam", b"restore"]


@pytest.mark.parametrize(
    "arguments",
    [["nosuch"], ["reparam"], ["reparam", "x", "--frobnicate"], ["reparam", "x", "--scope", "all"],
     ["reparam", "x", "--num-classes", "0"]],
)  # fmt: skip
def test_wrong_usage(arguments, capsys):
    assert run(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("Usage: pathconvert")


def test_traceback_only_with_debug(here, capsys):
    assert run(["inspect", "none.pt", "--debug"]) == 2
    debugged = capsys.readouterr().err
    assert debugged.startswith("Traceback (most recent call last):")
    assert debugged.splitlines()[-2].startswith("error: none.pt does not exist")
    assert run(["inspect", "none.pt"]) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (
            ValueError("one\ntwo"),
            2,
            (
                "error: unexpected ValueError: one\ntip: run again with --debug and report what it"
                " prints\n"
            ),
        ),
    ],
)
def test_the_unexpected(here, monkeypatch, capsys, error, code, text):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("pathconvert.networks.loading.open_network", fail)
    assert run(["inspect", "sq.pt"]) == code
    assert capsys.readouterr().err.endswith(text)
