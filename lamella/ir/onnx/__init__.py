"""Reading ONNX files into graphs."""

from lamella.ir.onnx.reader import read_onnx

__all__ = ["read_onnx"]
