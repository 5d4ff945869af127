"""Measured times of kernels: how they are measured, kept, and handed to passes."""
