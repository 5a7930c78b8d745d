"""From a network to one proven .onnx file."""
