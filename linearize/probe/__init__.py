"""`linearize probe`: what each head of a pretrained model attends to, what it costs to take that away, and which few
layers or heads are worth their cache.

    statistics.py   where the attention mass of each head lies, from exact softmax weights
    needles.py      texts with a number hidden in them, and the answer at their end
    damage.py       loss and recall with one layer, or one key/value head, that sees its window alone
    selection.py    what to keep within a budget of bytes, as a recipe
    probing.py      all of it in order
    telling.py      the figures in words and tables; plots.py draws them, report.py writes the files
"""

from linearize.probe.probing import Probe, ProbeOptions, run_probe
from linearize.probe.selection import Budget

__all__ = ["Budget", "Probe", "ProbeOptions", "run_probe"]
