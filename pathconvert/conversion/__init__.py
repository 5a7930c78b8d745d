"""Convert a network in memory: trace, groups, pivots, scales, rewrite, and the check that it is the same function."""
