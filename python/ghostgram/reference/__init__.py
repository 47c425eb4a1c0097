"""The slow truth: float64 NumPy in stable form, importing nothing of ours."""
