"""The score stage: the influence model over the pool, by processes of one machine or of a Ray cluster."""
