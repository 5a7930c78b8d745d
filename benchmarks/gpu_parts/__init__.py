"""What ``gpu.py`` runs: a module for every part, with ``measure(context)`` and, where something can
be made ready in the background while earlier parts run, ``prepare(context)``.
"""
