"""Files of tensors.

Tell what a file is, read it without executing anything, write it whole or not at all.
"""
