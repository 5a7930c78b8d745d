"""Converting a network in memory: trace, groups, pivots, scales, rescale; and the check that its function stays."""
