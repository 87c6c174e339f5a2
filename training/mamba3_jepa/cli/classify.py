"""`mamba3-jepa classify`."""

from __future__ import annotations

from collections.abc import Iterator

from mamba3_jepa.cli.confusion import confusion_cell, confusion_line, confusion_values
from mamba3_jepa.cli.output import say, show, table, write_out
from mamba3_jepa.evaluation.zero_shot import class_templates
from mamba3_jepa.files.lines import texts_or_file
from mamba3_jepa.files.path_text import path_text
from mamba3_jepa.inference.embeddings import embed_images, find_images
from mamba3_jepa.inference.opening import open_model
from mamba3_jepa.inference.zero_shot import Classified, classify
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
    classified = classify(
        model,
        images,
        labels,
        templates=templates,
        temperature=settings.temperature,
        batch_size=settings.batch_size,
    )
    if settings.json:
        write_out([_values(each, settings.top) for each in classified])
        return
    line = confusion_line([each.confusion for each in classified])
    columns = ("image", "label", "probability", *(() if line is None else ("confusion",)))
    rows = [row[: len(columns)] for each in classified for row in _rows(each, settings.top)]
    show(table(columns, rows))
    if line is not None:
        say(line)


def _values(classified: Classified, top: int) -> dict[str, object]:
    confusion = classified.confusion
    return {
        "image": path_text(classified.name),
        "labels": [{"label": label, "probability": p} for label, p in classified.labels[:top]],
        "threshold": None if confusion is None else confusion.threshold,
        **confusion_values(confusion),
    }


def _rows(classified: Classified, top: int) -> Iterator[tuple[str, ...]]:
    """A row for each label; what is said of the image stands beside the best."""
    about = path_text(classified.name), confusion_cell(classified.confusion)
    for label, probability in classified.labels[:top]:
        yield about[0], label, f"{probability:.3f}", about[1]
        about = "", ""
