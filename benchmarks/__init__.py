"""A package, so that `python -m benchmarks.gpu` finds it before one of that name which a wheel has installed."""
