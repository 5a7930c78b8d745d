"""ONNX Runtime: sessions on a device, timing, and classifying images."""
