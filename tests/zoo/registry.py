"""All models of the zoo, by name."""

from zoo import language, other, vision

ZOO = {entry.name: entry for entry in [*language.ENTRIES, *vision.ENTRIES, *other.ENTRIES]}
