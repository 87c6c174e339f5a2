"""Texts that tokenizers in other languages are apt to get wrong, with their ids."""

from __future__ import annotations

AWKWARD_TEXTS = (
    "",
    "   ",
    " what color is the circle? ",
    "What Color  is\tthe  CIRCLE?!",
    "isn't it? they're red; we'll see, I'd say",
    "line one\nline two\r\n\n  indented\n",
    "<eos>",
    "<pad><bos>a red circle<eos> and more",
    "😀 👩‍👩‍👧‍👦 👍🏽 🇩🇪",
    "é e\u0301 Å A\u030a ﬁ ½ ㎏",
    "z\u0351\u036b\u0343a\u0334l\u0337go",
    "ما لون الدائرة؟",
    "מה צבע העיגול?",
    "圆形是什么颜色?「赤い円」",
    "какого цвета круг",
    "วงกลมสีอะไร",
    "\u16a0\u16b1 \u13a3 \U00012000",
    "a\u00a0b\u2003c\u200bd\u202ee\ufefff",
    "null \x00 byte \x01\x7f",
    "1234567890 3.14 1,000,000 ٣٤٥ ²",
    "snake_case camelCase http://example.com/?a=b&c=%20#d",
    "\ufffd\ufffe\U0010ffff",
    "a" * 300,
    "a small red circle above a large blue square; " * 100,
    "größer als 😀 und красный 圆 " * 60,
)
