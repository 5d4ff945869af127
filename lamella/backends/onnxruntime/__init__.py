"""ONNX Runtime: our own writer from canonical operators to ONNX, and sessions that run it."""
