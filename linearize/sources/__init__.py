"""Models as they come: folders, GGUF files, Hub ids."""
