"""Decoders that `benchmarks.decode` times: ours, and what others make of the same model."""
