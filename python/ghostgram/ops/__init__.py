"""Front doors: one file per op, any array type in, the same type out."""
