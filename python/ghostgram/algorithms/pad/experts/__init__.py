"""Nets whose trajectories are matched, and where these are kept."""
