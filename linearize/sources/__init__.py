"""Locate, check and load models: folders, GGUF files, Hub ids."""
