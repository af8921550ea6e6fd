"""Loaded by Krita beside the plugin under test."""

from .runner import begin

begin()
