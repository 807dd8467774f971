"""Text generation: prompt, engine, sampling and saved states."""
