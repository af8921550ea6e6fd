"""StoryDiffusion for Krita: the engine. It knows no Krita, no Qt and no HTTP."""

__version__ = "0.1.0"
