"""The commands, one function each; ``cli.py`` puts them together.

torch is imported inside them: ``--help`` has to be quick.
"""
