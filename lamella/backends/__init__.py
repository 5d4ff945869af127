"""Backends: from a graph to an executable."""
