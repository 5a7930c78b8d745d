"""Files of tensors: what a file is, reading it without executing anything, writing it whole or not at all."""
