"""StoryDiffusion in Krita: the Story docker.

Krita imports this package by itself. Everywhere else (tests, tools) only its modules are of use.
"""

try:
    import krita
except ImportError:
    pass
else:
    from .plugin import register

    register(krita.Krita.instance())
