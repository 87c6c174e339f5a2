"""What an image file says beside its pixels: the orientation is read from it, the rest is kept from the decoder.

Decoders refuse good pictures for damaged or oversized EXIF, text or colour profiles, none of which is needed here. So
a decoder is given the parts that pixels are made of. Nothing in this module raises: what cannot be read is left to
the decoder, and an orientation that cannot be read is none.

The orientation is what the first of these says: EXIF (JPEG: the APP1 segments; PNG: the `eXIf` chunk, else the text
`Raw profile type exif`; WebP: the `EXIF` chunk that the header announces), then XMP (`tiff:Orientation` in the APP1
segment, the text `XML:com.adobe.xmp`, the `XMP ` chunk). GIF and BMP have none.
"""

from __future__ import annotations

import re
import struct
import zlib

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_TEXT_CHUNKS = {b"tEXt", b"zTXt", b"iTXt"}
_EXIF_TEXT, _XMP_TEXT = b"Raw profile type exif", b"XML:com.adobe.xmp"
_MAX_TEXT = 2**20  # bytes of an inflated text; a longer one is not read

_XMP_ORIENTATION = re.compile(rb"""tiff:Orientation(?:=["']|>)([0-9])""")
_EXIF_HEADER = re.compile(rb"\A(?:Exif\0\0){1,2}")  # some writers put it twice
_ORIENTATION_TAG = 0x0112
# TIFF's types for whole numbers; the signed ones are read as unsigned, which is the same for what is valid
_INTEGER_TYPES = {1: "B", 6: "B", 3: "H", 8: "H", 4: "I", 9: "I"}


def split_metadata(data: bytes) -> tuple[bytes, int]:
    """The bytes of a file to hand to a decoder, and the orientation.

    Returns:
        `data` without metadata, and EXIF's orientation, 1 (upright) to 8.
    """
    exif: bytes | None = None
    xmp: bytes | None = None
    if data.startswith(_PNG_SIGNATURE):
        data, exif, xmp = _split_png(data)
    elif data.startswith(b"\xff\xd8\xff"):
        data, exif, xmp = _split_jpeg(data)
    elif data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        exif, xmp = _webp_metadata(data)
    elif data[:6] in (b"GIF87a", b"GIF89a") and len(data) > 13:
        data = _split_gif(data)
    orientation = None if exif is None else _exif_orientation(exif)
    if orientation is None and xmp is not None and (match := _XMP_ORIENTATION.search(xmp)):
        orientation = int(match[1])
    return data, orientation if orientation is not None and 1 <= orientation <= 8 else 1


def _split_png(data: bytes) -> tuple[bytes, bytes | None, bytes | None]:
    kept = _Pieces(data, end=8)
    exif = None
    texts: dict[bytes, tuple[bytes, bytes]] = {}  # kind and content by keyword; of several the last counts
    position, kind, header = 8, b"", b""
    taken: set[bytes] = set()
    while position + 12 <= len(data) and kind != b"IEND":
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 12 + length
        if end > len(data):
            break
        body = data[position + 8 : end - 4]
        if _is_pixel_chunk(kind, length, header, taken):
            taken.add(kind)
            if kind == b"IHDR":
                header = body
            if kind == b"PLTE" and not body:
                raise ValueError("its palette is empty")
            whole = _png_chunk(kind, body) == data[position:end] if kind == b"tRNS" else False
            if whole and header[9] == 3 and length > 256:
                pass  # more than there can be indices
            elif whole and header[9] != 3:
                kept.add(_png_chunk(kind, _key_as_decoded(body, header[8], header[9])))
            else:
                kept.keep(position, end)
        elif kind == b"eXIf":
            exif = body
        elif kind in _PNG_TEXT_CHUNKS:
            keyword, _, text = body.partition(b"\0")
            if keyword in (_EXIF_TEXT, _XMP_TEXT):
                texts[keyword] = kind, text
        position = end
    cut_pixels = data[position + 4 : position + 8] == b"IDAT"
    if kind == b"IEND":
        pass
    elif cut_pixels or b"IDAT" in taken:
        # The file is cut short, but whether pixels are missing is seen when they are inflated.
        if cut_pixels:
            kept.add(_png_chunk(b"IDAT", data[position + 8 :]))
        kept.add(_png_chunk(b"IEND", b""))
    else:
        kept.keep(position, len(data))
    if exif is None and _EXIF_TEXT in texts:
        profile = _png_text(*texts[_EXIF_TEXT])
        exif = None if profile is None else _raw_profile(profile)
    return kept.join(), exif, _png_text(*texts[_XMP_TEXT]) if _XMP_TEXT in texts else None


def _split_gif(data: bytes) -> bytes:
    """Without comments and applications' data before the first image; the graphic control says what is transparent."""
    position = 13 + (3 << (1 + (data[10] & 7)) if data[10] & 0x80 else 0)
    kept = _Pieces(data, end=position)
    while data[position : position + 1] == b"!":
        end = position + 2
        while end < len(data) and data[end]:
            end += 1 + data[end]
        if data[position + 1 : position + 2] == b"\xf9":
            kept.keep(position, end + 1)
        position = end + 1
    kept.keep(position, len(data))
    return kept.join()


class _Pieces:
    """What is kept of a file: parts of it as they lie, of which neighbours are one piece, and others in their place."""

    def __init__(self, data: bytes, end: int) -> None:
        self._data, self._start, self._end = data, 0, end
        self._pieces: list[bytes] = []

    def keep(self, start: int, end: int) -> None:
        if start != self._end:
            self._pieces.append(self._data[self._start : self._end])
            self._start = start
        self._end = end

    def add(self, piece: bytes) -> None:
        self._pieces += [self._data[self._start : self._end], piece]
        self._start = self._end = -1

    def join(self) -> bytes:
        return b"".join([*self._pieces, self._data[self._start : self._end]])


def _is_pixel_chunk(kind: bytes, length: int, header: bytes, taken: set[bytes]) -> bool:
    """Whether a PNG's pixels are made of this chunk, after those `taken`.

    Of several headers, palettes and transparent colours the first counts, if it stands where it should: before the
    pixels, and a transparent colour after the palette it belongs to.
    """
    colour = header[9] if len(header) > 9 else None
    if kind in (b"IDAT", b"IEND"):
        return True
    if kind in taken or b"IDAT" in taken:
        return False
    if kind == b"tRNS":
        if colour == 3:
            return b"PLTE" in taken
        return colour in (0, 2) and length >= 2 * (colour + 1)  # a shorter one is no colour
    return kind == b"IHDR" or (kind == b"PLTE" and colour == 3)


def _png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _key_as_decoded(body: bytes, depth: int, colour: int) -> bytes:
    """The transparent colour in the range that Pillow decodes to: 8 bits, 16 only for grey of 16."""
    samples = struct.unpack_from(f">{colour + 1}H", body)
    top = (1 << depth) - 1
    if depth < 8:
        samples = tuple((sample & top) * 255 // top for sample in samples)
    elif depth == 8 or colour == 2:
        samples = tuple((sample & top) >> (depth - 8) for sample in samples)
    return struct.pack(f">{len(samples)}H", *samples)


def _png_text(kind: bytes, text: bytes) -> bytes | None:
    """The text of a text chunk from what stands behind its keyword; None if it is damaged or too long."""
    compressed = kind == b"zTXt"
    if kind == b"iTXt":
        compressed = text[:1] != b"\0"
        _language, _, text = text[2:].partition(b"\0")
        _translated, _, text = text.partition(b"\0")
    elif compressed:
        text = text[1:]  # the method: there is only one
    if not compressed:
        return text
    inflate = zlib.decompressobj()
    try:
        text = inflate.decompress(text, _MAX_TEXT)
    except zlib.error:
        return None
    return text if inflate.eof else None


def _raw_profile(text: bytes) -> bytes | None:
    """ImageMagick's form: an empty line, the kind, the length, then hexadecimal digits over many lines."""
    try:
        return bytes.fromhex("".join(text.decode("ascii").split("\n")[3:]))
    except ValueError:
        return None


def _split_jpeg(data: bytes) -> tuple[bytes, bytes | None, bytes | None]:
    kept = [data[:2]]
    exif = bytearray()
    xmp: bytes | None = None
    position = 2
    while data[position : position + 1] == b"\xff" and position + 4 <= len(data):
        marker = data[position + 1]
        if marker == 0xFF:  # a fill byte
            position += 1
            continue
        length = int.from_bytes(data[position + 2 : position + 4], "big")
        end = position + 2 + length
        if marker in (0x00, 0x01, 0xD9, 0xDA) or 0xD0 <= marker <= 0xD7 or length < 2 or end > len(data):
            break  # the scan, or nothing that has a length
        body = data[position + 4 : end]
        if marker == 0xE1 and body.startswith(b"Exif\0\0"):
            exif += body[6:] if exif else body  # EXIF over 64 KiB goes on in the next segment
        elif marker == 0xE1 and body.startswith(b"http://ns.adobe.com/xap/1.0/\0"):
            xmp = body
        elif not _is_jpeg_metadata(marker, body):
            kept.append(data[position:end])
        position = end
    return b"".join([*kept, data[position:]]), bytes(exif) if exif else None, xmp


def _is_jpeg_metadata(marker: int, body: bytes) -> bool:
    """Application segments and comments, but for the two that say how colours are stored."""
    if marker == 0xE0 and body.startswith(b"JFIF\0"):
        return len(body) < 14
    if marker == 0xEE and body.startswith(b"Adobe"):
        return len(body) < 12
    return 0xE0 <= marker <= 0xEF or marker == 0xFE


def _webp_metadata(data: bytes) -> tuple[bytes | None, bytes | None]:
    flags = data[20] if data[12:16] == b"VP8X" and len(data) > 20 else 0
    wanted = {kind: None for kind, bit in ((b"EXIF", 0x08), (b"XMP ", 0x04)) if flags & bit}
    found: dict[bytes, bytes] = {}
    position = 12
    while position + 8 <= len(data):
        kind, length = struct.unpack_from("<4sI", data, position)
        body = data[position + 8 : position + 8 + length]
        if kind in wanted and len(body) == length:
            found.setdefault(kind, body)
        position += 8 + length + length % 2
    return found.get(b"EXIF"), found.get(b"XMP ")


def _exif_orientation(exif: bytes) -> int | None:
    """The tag 0x0112 of the first directory; None if there is none that can be read."""
    tiff = _EXIF_HEADER.sub(b"", exif)
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None or tiff[2:4] not in (b"*\0", b"\0*"):
        return None
    try:
        (directory,) = struct.unpack_from(order + "I", tiff, 4)
        (entries,) = struct.unpack_from(order + "H", tiff, directory)
        for position in range(directory + 2, directory + 2 + 12 * entries, 12):
            tag, kind, count = struct.unpack_from(order + "HHI", tiff, position)
            if tag == _ORIENTATION_TAG and kind in _INTEGER_TYPES and count == 1:
                (value,) = struct.unpack_from(order + _INTEGER_TYPES[kind], tiff, position + 8)
                return int(value)
    except struct.error:  # the directory ends early
        pass
    return None
