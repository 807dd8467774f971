"""`linearize probe`: the attention of each head of a pretrained model, the damage of windowing layers or heads, and the
choice of those to keep as softmax.

    statistics.py   the attention mass of each head by distance, from exact softmax weights
    needles.py      texts with a hidden number and a question for it at their end
    damage.py       loss and recall with one windowed layer, or one windowed key/value head
    selection.py    the choice within a budget of bytes, as a recipe
    probing.py      all of it in order
    telling.py      the figures as sentences and tables; plots.py draws them, report.py writes the files
"""

from linearize.probe.probing import Probe, ProbeOptions, run_probe
from linearize.probe.selection import Budget

__all__ = ["Budget", "Probe", "ProbeOptions", "run_probe"]
