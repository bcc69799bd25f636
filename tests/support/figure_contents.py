"""What a matplotlib figure shows, for tests of figures."""


def drawn(axes):
    """The points of each line, by its label."""
    return {line.get_label(): line.get_xydata().tolist() for line in axes.lines}


def legend(owner):
    found = owner.get_legend() if hasattr(owner, "get_legend") else owner
    return [text.get_text() for text in found.get_texts()]


def points(x, y):
    return [[float(a), float(b)] for a, b in zip(x, y, strict=True)]


def looks(axes):
    return [(line.get_color(), line.get_linestyle(), line._unscaled_dash_pattern) for line in axes.lines]
