"""The report's colours, by role, for light and dark pages."""

LIGHT = {
    "page": "#f6f7f9",
    "card": "#fffffe",
    "ink": "#1b2330",
    "muted": "#5f6b7a",
    "line": "#dde2e9",
    "bad": "#c2362b",
    "good": "#2f855b",
    "series-1": "#2f6db5",
    "series-2": "#d07a1f",
    "series-3": "#7a4fb3",
    "series-4": "#15908c",
    "series-5": "#b0457f",
    "series-6": "#77802a",
}
DARK = {
    "page": "#10141a",
    "card": "#191f28",
    "ink": "#e7ebf1",
    "muted": "#98a4b4",
    "line": "#2e3744",
    "bad": "#f2766b",
    "good": "#5cc491",
    "series-1": "#6ea8ec",
    "series-2": "#eda24e",
    "series-3": "#b18be8",
    "series-4": "#4fc4bd",
    "series-5": "#e583b4",
    "series-6": "#b4bd5f",
}


def series(index: int) -> str:
    """The role of the index-th series; after six they repeat."""
    return f"series-{index % 6 + 1}"


def css_variables() -> str:
    """Both palettes as CSS custom properties."""

    def block(colours: dict[str, str]) -> str:
        return ":root{" + "".join(f"--{role}:{colour};" for role, colour in colours.items()) + "}"

    return f"{block(LIGHT)}@media(prefers-color-scheme:dark){{{block(DARK)}}}"
