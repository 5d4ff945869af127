"""The PyTorch backends: the graph as it is (eager), and compiled ahead of time (aot)."""
