"""ONNX and ONNX Runtime without torch: sessions, quantization, latency, host facts, the deployable bundle."""
