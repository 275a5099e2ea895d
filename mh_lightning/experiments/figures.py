"""The figure of a series: a panel a stream, a point and its interval an experiment."""

from collections.abc import Sequence

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mh_lightning.experiments.streams import Stream, shared_name
from mh_lightning.experiments.tables import Summary

OWN, BASELINE, PUBLISHED = "#1f5a96", "#b3541e", "#4d4d4d"


def series_figure(streams: Sequence[Stream], summaries: Sequence[Sequence[Summary]], metric: str, title: str) -> Figure:
    """Means with their 95% intervals, in per cent; a point without a bar is one value, with no interval.

    Args:
        streams: a panel each.
        summaries: of each of them; experiments without a run have no point.
        metric: that is shown.
        title: of the figure.
    """
    columns = 1 if len(streams) == 1 else 2
    rows = -(-len(streams) // columns)
    heights = [0.75 + 0.24 * max(len(row) for row in summaries[first : first + columns])
               for first in range(0, len(streams), columns)]  # fmt: skip
    figure = Figure(figsize=(6.2 * columns, 0.6 + sum(heights)), layout="constrained")
    grid = figure.add_gridspec(rows, columns, height_ratios=heights)
    handles: dict[str, Artist] = {}
    for panel, (stream, rows_of_stream) in enumerate(zip(streams, summaries, strict=True)):
        axes = figure.add_subplot(grid[panel // columns, panel % columns])
        _draw(axes, stream, rows_of_stream, metric)
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
        if panel >= len(streams) - columns:
            axes.set_xlabel(f"{metric.replace('_', ' ')} (%), mean and 95% interval", fontsize=9)
    figure.suptitle(title)
    if handles:
        figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=len(handles))
    return figure


def _draw(axes: Axes, stream: Stream, summaries: Sequence[Summary], metric: str) -> None:
    for place, summary in enumerate(summaries):
        is_baseline = summary.experiment == stream.baseline
        colour = BASELINE if is_baseline else OWN
        if metric in summary.numbers:
            mean, half_width = summary.numbers[metric][:2]
            label = "baseline" if is_baseline else None
            spread = None if half_width is None else 100 * half_width
            axes.errorbar(100 * mean, place, xerr=spread, fmt="o", color=colour, markersize=4.5, capsize=2.5,
                          linewidth=1.3, label=label)  # fmt: skip
            if is_baseline:
                axes.axvline(100 * mean, color=colour, linewidth=0.8, linestyle="--", zorder=0)
        if summary.published:
            axes.plot(100 * summary.published.value, place, "D", color=PUBLISHED, markersize=5, fillstyle="none",
                      label="published")  # fmt: skip
    shared = shared_name(stream.experiments)
    labels = [name.removeprefix(shared).lstrip("_-").replace("_", " ") for name in stream.experiments]
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.set_ylim(len(labels) - 0.4, -0.6)  # the first on top
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7))
    axes.margins(x=0.08)
    axes.grid(axis="x", linewidth=0.4, alpha=0.6)
    axes.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.set_title(stream.title, fontsize=10, loc="left")
