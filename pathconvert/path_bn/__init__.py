"""The Path-BN form of a network: the layer, entering, leaving, and the way back to the original."""
