"""Networks in files.

Architectures, preprocessing, images, loading and saving, and conversions that are checked.
"""
