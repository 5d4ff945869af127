"""Relevance as a graph: the forward, the sweep of coefficients, and what is read from it."""
