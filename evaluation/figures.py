"""Pictures of scores. matplotlib is imported where a picture is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from evaluation.scoring import MIXTURE_ESTIMATE
from models.errors import InputError
from models.files import whole_file

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, told apart by the colour-blind too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MIN_SPAN_DB = 2.0


@dataclass(frozen=True)
class Curve:
    """One line of a panel; NaN leaves a gap. `low` and `high` shade a range around it."""

    label: str
    values: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    dashed: bool = False


@dataclass(frozen=True)
class Panel:
    """Lines over one axis: positions named by `ticks`, or over frequencies in Hz if `log`."""

    title: str
    xlabel: str
    ylabel: str
    ticks: Sequence[str]
    curves: Sequence[Curve]
    hertz: Sequence[float] | None = None


def draw_panels(panels: Sequence[Panel]) -> Figure:
    """Panels side by side, with one legend; a label has one colour in all of them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * len(panels), 3.8), dpi=100, layout="constrained")
    labels = list(dict.fromkeys(curve.label for panel in panels for curve in panel.curves))
    colours = colours_of(labels)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, panel in zip(axes, panels, strict=True):
        _draw_panel(axis, panel, colours)
    handles: dict[str, Artist] = {}
    for axis in axes:
        lines, names = axis.get_legend_handles_labels()
        handles |= dict(zip(names, lines, strict=True))
    if handles:
        figure.legend(
            list(handles.values()),
            list(handles),
            loc="outside lower center",
            ncols=4,
            frameon=False,
        )
    return figure


def colours_of(labels: Sequence[str]) -> dict[str, str]:
    """A colour for each label; the mixture, which is in every picture, is grey."""
    others = [label for label in labels if label != MIXTURE_ESTIMATE]
    colours = {label: COLOURS[i % len(COLOURS)] for i, label in enumerate(others)}
    return colours | {MIXTURE_ESTIMATE: "#777777"}


def _draw_panel(axis: Axes, panel: Panel, colours: dict[str, str]) -> None:
    positions = panel.hertz if panel.hertz is not None else range(len(panel.ticks))
    for curve in panel.curves:
        colour = colours[curve.label]
        style = "--" if curve.dashed else "-"
        marker = "" if panel.hertz is not None else "o"
        values = np.where(np.isfinite(curve.values), curve.values, np.nan)
        axis.plot(positions, values, style, marker=marker, color=colour, label=curve.label)
        if curve.low is not None and curve.high is not None:
            axis.fill_between(
                positions, curve.low, curve.high, color=colour, alpha=0.15, linewidth=0
            )
    if panel.hertz is not None:
        axis.set_xscale("log")
        axis.set_xticks([100, 300, 1000, 3000, 10000], ["100", "300", "1k", "3k", "10k"])
        axis.minorticks_off()
    else:
        axis.set_xticks(range(len(panel.ticks)), panel.ticks)
    low, high = axis.get_ylim()
    if high - low < MIN_SPAN_DB:  # a flat line shall look flat
        middle = (low + high) / 2
        axis.set_ylim(middle - MIN_SPAN_DB / 2, middle + MIN_SPAN_DB / 2)
    axis.set_title(panel.title, fontsize=11)
    axis.set_xlabel(panel.xlabel)
    axis.set_ylabel(panel.ylabel)
    axis.grid(alpha=0.3)


def draw_boxes(groups: dict[str, dict[str, Sequence[float]]], ylabel: str) -> Figure:
    """Box plots: title of a panel -> label -> values of the tracks, drawn as points too."""
    from matplotlib.figure import Figure

    count = max(len(group) for group in groups.values())
    width = max(3.0, 1.1 * count) * len(groups)
    figure = Figure(figsize=(width, 3.8), dpi=100, layout="constrained")
    axes = figure.subplots(1, len(groups), squeeze=False)[0]
    rng = np.random.default_rng(0)
    for axis, (title, group) in zip(axes, groups.items(), strict=True):
        colours = colours_of(list(group))
        for place, (label, values) in enumerate(group.items()):
            colour = colours[label]
            known = np.asarray(values, float)
            known = known[np.isfinite(known)]
            if not known.size:
                continue
            axis.boxplot(
                [known],
                positions=[place],
                widths=0.55,
                showfliers=False,
                medianprops={"color": colour, "linewidth": 2},
            )
            spread = place + rng.uniform(-0.15, 0.15, known.size)
            axis.plot(spread, known, ".", color=colour, alpha=0.6)
        axis.set_xticks(range(len(group)), list(group), rotation=20, ha="right")
        axis.set_title(title, fontsize=11)
        axis.grid(axis="y", alpha=0.3)
    axes[0].set_ylabel(ylabel)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG atomically. Raises InputError, naming the file, if that fails."""
    try:
        with whole_file(path) as part:
            figure.savefig(part)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from error
