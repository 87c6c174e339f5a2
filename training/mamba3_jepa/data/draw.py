"""Scenes as pictures, at any size: drawn larger with Pillow, then reduced, so that edges are smooth."""

from __future__ import annotations

import math

from PIL import Image, ImageDraw

from mamba3_jepa.data.scene_world import POSITIONS, Scene, SceneObject

_RGB = {
    "red": (214, 39, 40),
    "green": (30, 140, 50),
    "blue": (35, 75, 200),
    "yellow": (240, 215, 30),
    "orange": (250, 130, 20),
    "purple": (130, 50, 160),
    "cyan": (40, 195, 205),
    "black": (25, 25, 25),
}
# In units of the picture's side; a quadrant's centre is 0.25 from its edges, so nothing touches a border.
_RADIUS = {"large": 0.18, "small": 0.10}
_JITTER = 0.05


def draw_scene(scene: Scene, image_size: int) -> Image.Image:
    """An RGB picture of `image_size` x `image_size` pixels."""
    scale = 4 if image_size <= 96 else 2
    side = image_size * scale
    grey = (scene.background,) * 3
    image = Image.new("RGB", (side, side), grey)
    pencil = ImageDraw.Draw(image)
    for item in scene.objects:
        _draw_object(pencil, item, side)
    return image.reduce(scale)


def _draw_object(pencil: ImageDraw.ImageDraw, item: SceneObject, side: int) -> None:
    row, column = divmod(POSITIONS.index(item.position), 2)
    x = side * (0.25 + 0.5 * column + _JITTER * item.offset[0])
    y = side * (0.25 + 0.5 * row + _JITTER * item.offset[1])
    r = side * _RADIUS[item.size]
    color = _RGB[item.color]
    if item.shape == "circle":
        pencil.ellipse((x - r, y - r, x + r, y + r), fill=color)
    elif item.shape == "square":
        a = 0.86 * r
        pencil.rectangle((x - a, y - a, x + a, y + a), fill=color)
    elif item.shape == "triangle":
        pencil.polygon([(x, y - r), (x + r, y + 0.8 * r), (x - r, y + 0.8 * r)], fill=color)
    elif item.shape == "star":
        pencil.polygon(_star(x, y, 1.1 * r, 0.45 * r), fill=color)
    elif item.shape == "cross":
        a = 0.34 * r
        pencil.rectangle((x - r, y - a, x + r, y + a), fill=color)
        pencil.rectangle((x - a, y - r, x + a, y + r), fill=color)
    else:
        raise ValueError(f"no such shape: {item.shape}")


def _star(x: float, y: float, outer: float, inner: float) -> list[tuple[float, float]]:
    corners = []
    for i in range(10):
        radius = inner if i % 2 else outer
        angle = math.pi * (i / 5 - 0.5)
        corners.append((x + radius * math.cos(angle), y + radius * math.sin(angle)))
    return corners
