"""Draws the results as labelled horizontal bars, one panel per task and one for the mean."""

from __future__ import annotations

from pathlib import Path

from benchmarks.demo.report import Results

_PARENTS = "#c9a227"
_WITH_FISHER = "#2a78b5"
_WITHOUT = "#8c8c8c"


def draw(results: Results, path: Path) -> None:
    """Write a PNG of accuracies in percent to `path`; an existing file is replaced whole."""
    import matplotlib

    matplotlib.use("Agg")  # there may be no screen
    from matplotlib import pyplot

    rows = (results.parents, *results.merged)
    colours = [_PARENTS, *(_WITH_FISHER if "fisher" in row.name else _WITHOUT for row in results.merged)]
    titles = [row.title for row in rows]
    panels = [(task, [row.accuracy(task) for row in rows], results.majority[task]) for task in results.tasks]
    mean_chance = sum(results.majority.values()) / len(results.majority)
    panels.append(("mean", [row.mean() for row in rows], mean_chance))

    figure, axes = pyplot.subplots(
        1,
        len(panels),
        sharey=True,
        figsize=(2.9 * len(panels) + 1.9, 0.5 * len(rows) + 1.4),
        layout="constrained",
    )
    for axis, (title, values, chance) in zip(axes, panels, strict=True):
        bars = axis.barh(titles, [100 * value for value in values], color=colours, height=0.7)
        axis.bar_label(bars, fmt="%.1f", padding=-5, label_type="edge", color="white", fontweight="bold")
        for label in axis.texts:
            label.set_horizontalalignment("right")
        axis.axvline(100 * chance, color="black", linestyle=":", linewidth=1)
        axis.set_xlim(0, 100)
        axis.set_title(title, fontweight="bold" if title == "mean" else "normal")
        axis.set_xlabel(f"accuracy on {results.part} texts, %")
        axis.tick_params(axis="y", length=0)
        axis.spines[["top", "right", "left"]].set_visible(False)
    axes[0].invert_yaxis()
    figure.suptitle(
        "One merged model, each task with its own head (dotted: always the commonest answer)", fontsize=11
    )
    temporary = path.with_name(path.name + ".tmp")
    figure.savefig(temporary, dpi=150, format="png")
    pyplot.close(figure)
    temporary.replace(path)
