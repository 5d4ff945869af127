"""Edited models in the file layouts that other runtimes load."""
