"""Bits within a budget: what formats cost, what they may cost, and the best choice."""
