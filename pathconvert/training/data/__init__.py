"""Labelled images: found, read, augmented, and given out in batches."""
