"""Passes: the contract, the manager, analyses and transforms."""
