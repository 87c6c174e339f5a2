"""`mamba3-jepa search`."""

from __future__ import annotations

from mamba3_jepa.cli.confusion import confusion_cell, confusion_line, confusion_values
from mamba3_jepa.cli.output import say, show, table, write_out
from mamba3_jepa.files.path_text import path_text
from mamba3_jepa.files.whole_file import demand_writable
from mamba3_jepa.inference.embeddings import embed_images, find_images
from mamba3_jepa.inference.opening import open_model
from mamba3_jepa.inference.zero_shot import search_images, search_sheet
from mamba3_jepa.settings.inference import SearchSettings


def run_search(settings: SearchSettings) -> None:
    """Rank images for a text and show the best.

    Raises:
        UserError: the settings, the checkpoint, an image or the output cannot be used.
    """
    demand_writable(settings.contact_sheet)
    paths = find_images(settings.images, settings.image_dir)
    model, _ = open_model(settings)
    images = embed_images(model, paths, batch_size=settings.batch_size, on_bad_sample=settings.on_bad_sample)
    found = search_images(model, settings.text, images, settings.top, batch_size=settings.batch_size)
    if settings.contact_sheet is not None:
        search_sheet(settings.text, found, settings.contact_sheet)
    if settings.json:
        recursion = model.recursion
        write_out(
            {
                "text": settings.text,
                "images_searched": len(images.names),
                "results": [
                    {"image": path_text(each.name), "cosine": each.cosine, **confusion_values(each.confusion)}
                    for each in found
                ],
                "threshold": None if recursion is None else float(recursion.confusion_probe.threshold),
            }
        )
        return
    line = confusion_line([each.confusion for each in found])
    columns = ("image", "cosine", *(() if line is None else ("confusion",)))
    rows = [(path_text(each.name), f"{each.cosine:.3f}", confusion_cell(each.confusion)) for each in found]
    say(f"{settings.text}   ({len(images.names)} images)")
    show(table(columns, [row[: len(columns)] for row in rows]))
    if line is not None:
        say(line)
