"""Analyses: questions about a graph and their reports."""
