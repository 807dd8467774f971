"""Steps of `convert` besides the swap: choose what keeps softmax, and fit layers, without training.

weights.py    where the weights are: in memory, or in files but for one block
blocks.py     the blocks of a model, called one at a time
closed.py     mix, gate and output projection in closed form
layer.py      one layer: closed forms, then some hundred steps, and what of it is kept
reading.py    what the model says to rows and needles, block by block
calibrate.py  layer after layer on the student's own inputs, and what of it all is kept
select.py     which layers or heads keep softmax under a budget
telling.py    what was kept and what was not, with figures
"""
