"""Relevance rules: how the coefficient of a value becomes the coefficients of its operands."""
