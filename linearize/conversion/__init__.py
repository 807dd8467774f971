"""Convert a pretrained model: inspect it, swap its attention, and stream its weights into a checkpoint."""
