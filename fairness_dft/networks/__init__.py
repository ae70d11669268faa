"""How frozen networks are loaded and called."""
