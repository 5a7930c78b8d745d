"""Turn a network into one .onnx file that is proven to be equal."""
