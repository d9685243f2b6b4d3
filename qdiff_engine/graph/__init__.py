"""The graph: captured from a module, fused into integer operators, interpreted in floats or simulated."""
