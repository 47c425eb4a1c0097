"""Velocitune: domain weights for continual pre-training that follow each domain's learning velocity, and its rivals."""
