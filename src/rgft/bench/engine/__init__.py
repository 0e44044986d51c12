"""The engine bench: time, FLOPs and memory of a training step, for each way of doing less of it."""
