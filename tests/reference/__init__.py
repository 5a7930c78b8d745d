"""Slow literal oracles that the tests compare against."""
