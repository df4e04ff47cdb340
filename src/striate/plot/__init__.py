"""The figures, as functions from data to a matplotlib `Figure`. No global state, nothing read from disk.

A run keeps one colour and one shape through all figures (`marks`); the run that others are compared with is
drawn in the colour of the text. Accuracies are shares of 1 in the data and percent in the figures; whiskers
are one standard error. What is pointed at says its value (`tip`). Figures are narrow enough for a phone and have no
background, to suit dark pages too.
"""

from matplotlib.figure import Figure

from striate.plot.curves import Curve, Panel, curves, grid
from striate.plot.layers import Profile, Reverted, blocks, instances, overlay, profiles, reverted
from striate.plot.runs import POINTS, Cost, accuracy, cost, losses, tasks, thinned
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
    "Reverted",
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
    "reverted",
    "save",
    "svg",
    "tasks",
    "thinned",
    "tip",
]
