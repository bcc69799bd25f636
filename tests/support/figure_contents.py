"""Reads the contents of matplotlib figures: lines, legends, colours."""


def drawn(axes):
    """The points of each line of the axes, by the line's label."""
    return {line.get_label(): line.get_xydata().tolist() for line in axes.lines}


def legend(owner):
    """The texts of a legend. `owner` is the legend or its axes."""
    shown = owner.get_legend() if hasattr(owner, "get_legend") else owner
    return [text.get_text() for text in shown.get_texts()]


def points(x, y):
    """Points in the form in which `drawn` returns them."""
    return [[float(a), float(b)] for a, b in zip(x, y, strict=True)]


def looks(axes):
    """The colour, the line style and the dashes of each line of the axes."""
    return [(line.get_color(), line.get_linestyle(), line._unscaled_dash_pattern) for line in axes.lines]


def saved_figures(monkeypatch):
    """A list to which each figure is appended when it is saved, from now on."""
    from matplotlib.figure import Figure

    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda fig, *args, **how: (figures.append(fig), save(fig, *args, **how)))
    return figures
