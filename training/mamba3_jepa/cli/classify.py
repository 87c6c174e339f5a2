"""`mamba3-jepa classify`."""

from __future__ import annotations

from mamba3_jepa.cli.output import show, table, write_out
from mamba3_jepa.evaluation.zero_shot import class_templates
from mamba3_jepa.files.lines import texts_or_file
from mamba3_jepa.files.path_text import path_text
from mamba3_jepa.inference.embeddings import embed_images, find_images
from mamba3_jepa.inference.opening import open_model
from mamba3_jepa.inference.zero_shot import classify
from mamba3_jepa.settings.inference import ClassifySettings


def run_classify(settings: ClassifySettings) -> None:
    """Choose a label for each image.

    Raises:
        UserError: the settings, the checkpoint, a label or an image cannot be used.
    """
    settings.check()
    labels = texts_or_file(settings.labels, "label", "labels")
    templates = class_templates(settings.template, "template")
    paths = find_images(settings.images, settings.image_dir)
    model, _ = open_model(settings)
    images = embed_images(
        model, paths, settings.question, batch_size=settings.batch_size, on_bad_sample=settings.on_bad_sample
    )
    chosen = classify(model, images, labels, templates=templates, temperature=settings.temperature)
    best = [ranked[: settings.top] for ranked in chosen]
    if settings.json:
        write_out(
            [
                {"image": path_text(name), "labels": [{"label": label, "probability": p} for label, p in ranked]}
                for name, ranked in zip(images.names, best, strict=True)
            ]
        )
        return
    rows = [
        (path_text(name) if number == 0 else "", label, f"{probability:.3f}")
        for name, ranked in zip(images.names, best, strict=True)
        for number, (label, probability) in enumerate(ranked)
    ]
    show(table(("image", "label", "probability"), rows))
