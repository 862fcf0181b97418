"""Pages of the laboratory, each a widget of its own."""
