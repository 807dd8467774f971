"""`linearize bench`: speed and memory of a converted model and of its teacher."""
