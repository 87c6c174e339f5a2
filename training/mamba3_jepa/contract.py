"""What readers in other languages rely on: names, versions, and numbers that `config.json` states. Free of torch."""

from __future__ import annotations

FORMAT = "mamba3-jepa"
FORMAT_VERSION = 2
READABLE_VERSIONS = (1, 2)  # 1 had no memory floor, and in its config.json no answers and fewer constants

MEMORY_FORMAT = "mamba3-jepa memory"
MEMORY_FORMAT_VERSION = "3"
READABLE_MEMORY_VERSIONS = ("2", "3")  # 1 had a digest that only Python could compute, 2 no episodes

MEMORY_TOOL = "memory"  # the tool that is built in: what a demonstration calls it

CLASS_TEMPERATURE = 0.07  # what training starts with; cosines of classes and known answers are divided by it
CLASS_TEMPLATE = "{}"
