"""From a pretrained model to a converted one: finding it, describing it, swapping its attention, writing it."""
