"""The figures, as functions from data to a matplotlib `Figure`. No global state, nothing read from disk.

A run has the same color and shape in all figures (`marks`); the reference run is plotted in the color of the text.
Accuracies are fractions in the data and percent in the figures; whiskers are one standard error. Tooltips show the
value of a point (`tip`). Figures are narrow enough for a phone and have no background, to suit dark pages too.
"""

from matplotlib.figure import Figure

from striate.plot.layers import (
    Profile,
    RevertProfile,
    blocks,
    instances,
    overlay,
    profiles,
    revert_profiles,
    task_heatmaps,
)
from striate.plot.runs import POINTS, Cost, Curve, Panel, accuracy, cost, curves, grid, losses, tasks, thin
from striate.plot.style import DARK, INK, PALETTE, SHAPES, Estimate, Mark, css, marks, save, svg, tip

__all__ = [
    "DARK",
    "INK",
    "PALETTE",
    "POINTS",
    "SHAPES",
    "Cost",
    "Curve",
    "Estimate",
    "Figure",
    "Mark",
    "Panel",
    "Profile",
    "RevertProfile",
    "accuracy",
    "blocks",
    "cost",
    "css",
    "curves",
    "grid",
    "instances",
    "losses",
    "marks",
    "overlay",
    "profiles",
    "revert_profiles",
    "save",
    "svg",
    "task_heatmaps",
    "tasks",
    "thin",
    "tip",
]
