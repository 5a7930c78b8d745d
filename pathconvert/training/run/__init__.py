"""A fine-tuning run: the network made ready, the loop, and the run's folder."""
