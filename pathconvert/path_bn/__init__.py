"""The Path-BN form of a network.

This is the layer, entering and leaving the form, and restoring the original network.
"""
