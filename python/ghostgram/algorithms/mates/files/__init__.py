"""The pool's files, and a run's: identities, commits, manifests."""
