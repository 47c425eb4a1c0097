"""Nets as flat vectors of weights."""
