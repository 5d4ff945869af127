"""The graph: capture, readers, canonical operators, residual stream, verifier, runner."""
