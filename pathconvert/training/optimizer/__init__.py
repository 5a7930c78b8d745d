"""Optimizers of path space: chains of units, G-SGD and Path-SGD."""
