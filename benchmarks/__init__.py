"""Speed and memory of curvlib beside other libraries, in gradients of the same network: ``python -m benchmarks``."""
