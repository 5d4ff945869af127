"""Bit plans at equal bytes: ours beside uniform widths, orders, heuristics and NNCF."""
