"""One file per op: inputs of hostile sizes, error bounds, bytes and FLOPs moved."""
