"""Fine-tuning in path space: G-SGD on Path-BN. Nothing is here yet; the converter came first."""
