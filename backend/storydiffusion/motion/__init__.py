"""Transitions: pictures that move into one another (Zhou et al., NeurIPS 2024, section 3.2)."""
