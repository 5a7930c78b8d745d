"""Fold and export to ONNX. Nothing is here yet; the converter came first."""
