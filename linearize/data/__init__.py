"""Training text: sources, records, documents and rows."""
