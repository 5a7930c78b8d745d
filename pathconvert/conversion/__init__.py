"""Converting a network in memory: trace, groups, pivots, scales, rescale.

The package also checks that the network's function stays the same.
"""
