"""Transforms: edits of a graph."""
