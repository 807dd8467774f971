"""Converted checkpoints in vLLM: a plugin for its own models, without a patch.

    plugin.py    the entry point, which vLLM calls in each of its processes
    settings.py  vLLM's settings that are set or refused
    models.py    a class per architecture: vLLM's own model with other attention
    weights.py   a checkpoint's weights by the names of vLLM's models
    layer.py     the attention of one layer, and its custom op
    pages.py     a layer's memory as one page of bytes
    batches.py   the sequences of a step as batches for the mixer

`plugin.py`, `pages.py` and `batches.py` import without vLLM.
"""
