"""The command line, from a checkout: ``python cli.py``."""

from pathconvert.cli import main

main()
