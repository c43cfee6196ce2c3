"""An adapted model leaves: as a program, ONNX, AOTInductor or ExecuTorch; and programs read back."""
