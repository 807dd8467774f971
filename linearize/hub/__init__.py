"""Share converted models: export, cards, carried code, and upload to the Hub."""
