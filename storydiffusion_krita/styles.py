"""The backend's style presets: ids of the protocol, titles for people."""

from __future__ import annotations

#: as in resources/styles.toml; a test compares
STYLES = {
    "none": "No style",
    "storybook": "Storybook",
    "comic": "Comic",
    "japanese-anime": "Japanese anime",
    "animation-3d": "3D animated film",
    "cinematic": "Cinematic",
    "photographic": "Photographic",
    "line-art": "Line art",
    "watercolor": "Watercolour",
    "manga-screentone": "Manga with screentone",
}
