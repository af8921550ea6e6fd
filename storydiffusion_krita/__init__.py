"""StoryDiffusion in Krita: the Story docker.

Krita imports this package by itself. Everywhere else (tests, tools) only its modules are of use.
"""

try:
    from krita import Krita
except ImportError:
    pass
else:
    from .plugin import register

    register(Krita.instance())
