"""`mamba3-jepa embed`."""

from __future__ import annotations

from mamba3_jepa.cli.output import say, write_out
from mamba3_jepa.files.lines import texts_or_file
from mamba3_jepa.files.whole_file import demand_writable
from mamba3_jepa.inference.embeddings import (
    NamedEmbeddings,
    embed_images,
    embed_texts,
    find_images,
    write_embeddings,
)
from mamba3_jepa.inference.opening import open_model
from mamba3_jepa.settings.inference import EmbedSettings


def run_embed(settings: EmbedSettings) -> None:
    """Embed what was asked for and write it.

    Raises:
        UserError: the settings, the checkpoint, an image or the output cannot be used.
    """
    settings.check()
    demand_writable(settings.output)
    has_images = bool(settings.images) or settings.image_dir is not None
    paths = find_images(settings.images, settings.image_dir) if has_images else []
    texts = texts_or_file(settings.texts, "text", "texts")
    model, _ = open_model(settings)
    groups: dict[str, NamedEmbeddings] = {}
    if paths:
        groups["images"] = embed_images(
            model, paths, settings.question, batch_size=settings.batch_size, on_bad_sample=settings.on_bad_sample
        )
    if texts:
        groups["texts"] = embed_texts(model, texts)
    written = write_embeddings(settings.output, groups)
    if settings.json:
        numbers = {name: len(groups[name].names) if name in groups else 0 for name in ("images", "texts")}
        write_out({"files": written, "embed_dim": model.config.embed_dim, **numbers})
        return
    counts = " and ".join(f"{len(group.names)} {name}" for name, group in groups.items())
    files = ", ".join(map(str, written))
    say(f"{counts}, {model.config.embed_dim} numbers each: {files}")
