"""Steps of `convert` besides the swap: choose the layers that keep softmax, and fit layers without training.

weights.py    the weights during calibration: in memory, or in files with one block loaded at a time
blocks.py     the blocks of a model, called one at a time
closed.py     mix, gate and output projection in closed form
layer.py      the fit of one layer: closed forms, then gradient steps; the best step is kept
reading.py    scores on rows and needles, block by block
calibrate.py  the fits layer by layer, and the decision which to keep in the whole model
select.py     the choice of layers or heads that keep softmax within a budget
backward.py   backward passes through the pretrained model, watched layer by layer
scores.py     the learned score of landmarks, and their distribution among layers by its costs
shares.py     the distribution of landmarks among layers without a learned score
telling.py    the result as lines, a page and data
"""
