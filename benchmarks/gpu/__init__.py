"""The GPU kernels on the card at hand: right, fast, and what a training step pays. `python -m benchmarks.gpu`."""
