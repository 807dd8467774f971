"""`linearize bench`: how fast a converted model reads and writes, beside its teacher, and what both keep in memory."""
