"""The same terminal wherever the tests run, for them and for the processes that they start.

rich and typer read a part of this when they are imported, so ``conftest.py`` imports this module
first.
"""

import os

for variable in (
    "TERM", "LINES", "TERMINAL_WIDTH", "FORCE_COLOR", "NO_COLOR", "PY_COLORS", "GITHUB_ACTIONS",
    "TTY_COMPATIBLE",
    "TTY_INTERACTIVE", "UNICODE_VERSION",
):  # fmt: skip
    os.environ.pop(variable, None)
os.environ["COLUMNS"] = "80"
