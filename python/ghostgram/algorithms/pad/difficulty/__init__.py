"""How hard each image is, and when experts see it."""
