"""`mamba3-jepa search`."""

from __future__ import annotations

from mamba3_jepa.cli.output import say, show, table, write_out
from mamba3_jepa.files.path_text import path_text
from mamba3_jepa.inference.embeddings import embed_images, find_images
from mamba3_jepa.inference.opening import open_model
from mamba3_jepa.inference.zero_shot import search_images, search_sheet
from mamba3_jepa.settings.inference import SearchSettings


def run_search(settings: SearchSettings) -> None:
    """Rank images for a text and show the best.

    Raises:
        UserError: the settings, the checkpoint, an image or the output cannot be used.
    """
    paths = find_images(settings.images, settings.image_dir)
    model, _ = open_model(settings)
    images = embed_images(model, paths, batch_size=settings.batch_size, on_bad_sample=settings.on_bad_sample)
    found = search_images(model, settings.text, images, settings.top)
    if settings.contact_sheet is not None:
        search_sheet(settings.text, found, settings.contact_sheet)
    if settings.json:
        results = [{"image": path_text(name), "cosine": cosine} for name, cosine in found]
        write_out({"text": settings.text, "images_searched": len(images.names), "results": results})
        return
    rows = [(path_text(name), f"{cosine:.3f}") for name, cosine in found]
    say(f"{settings.text}   ({len(images.names)} images)")
    show(table(("image", "cosine"), rows))
