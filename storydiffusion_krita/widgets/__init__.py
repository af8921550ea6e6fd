"""What the artist sees. Colours come from the palette, so light and dark themes are the same code."""
