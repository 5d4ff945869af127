"""Measurements behind the figures of the README; each script prints a table and writes JSON."""
