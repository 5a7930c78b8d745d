"""The commands, one function each; ``cli.py`` puts them together.

They import torch only when they run, so that ``--help`` is quick.
"""
