"""Quantized networks as integers: execution, ONNX with low-bit types, torch.export."""
