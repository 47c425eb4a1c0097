"""Rules that turn what a training run observes into the weights of its domains."""
