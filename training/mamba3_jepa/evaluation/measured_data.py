"""The samples that `mamba3-jepa evaluate` measures on, and what must be known of them to read the numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mamba3_jepa.data.sample import Source
from mamba3_jepa.data.scenes import may_have_validated_on_test
from mamba3_jepa.data.shard_cache import shard_cache
from mamba3_jepa.data.sources import DataSplits, SceneSource, open_source, open_splits, usable
from mamba3_jepa.data.splits import learned_in_phase3, split_by_hash
from mamba3_jepa.errors import UserError
from mamba3_jepa.files.checkpoint import Checkpoint
from mamba3_jepa.settings.inference import EvaluateSettings

SCENES = 256  # as many distinct scenes as the gallery of the README's numbers

MeasuredSplit = Literal["test", "val", "compositional", "manifest"]

_TOO_GOOD = "the numbers may look too good"


@dataclass(frozen=True, kw_only=True)
class MeasuredData:
    """What is measured.

    split: of scenes which; of a data directory "val", the held-out part, or "manifest", the one that was named.
    indices: what should be answered; none where all samples are labelled as confused or have no answer.
    confusion_indices: what confusion is measured on: those and samples with a `confused` label, but none that phase 3
    learned from. note: why the numbers may look too good, if they may. held_out_of: fingerprint of the data of which it
    is the held-out part.
    """

    source: Source
    indices: NDArray[np.int64]
    confusion_indices: NDArray[np.int64]
    split: MeasuredSplit
    note: str | None = None
    held_out_of: str | None = None


def open_measured(settings: EvaluateSettings, checkpoint: Checkpoint, measures_confusion: bool) -> MeasuredData:
    """What was held out is what the checkpoint's own run held out.

    Args:
        measures_confusion: a manifest may hold nothing but samples that are labelled as confused or have no answer.

    Raises:
        UserError: the data cannot be used, or there is none in the folder.
    """
    image_size, seed = checkpoint.config.vision.image_size, int(checkpoint.run["seed"])
    if settings.data_dir is None:
        scenes = SceneSource(settings.scenes, n_scenes=SCENES, seed=seed, image_size=image_size)
        note = _note_on_scenes(settings, checkpoint)
        indices = scenes.indices("target")
        return MeasuredData(source=scenes, indices=indices, confusion_indices=indices, split=settings.scenes, note=note)
    if settings.manifest is not None:
        source = open_source(settings.data_dir, manifest=settings.manifest, on_bad_sample=settings.on_bad_sample)
        assert source is not None  # a named manifest is opened or is an error
        labelled = source.indices("confused")
        nothing_else = measures_confusion and len(labelled) > 0 and not len(source.indices("target"))
        indices = labelled[:0] if nothing_else else usable(source)
        return MeasuredData(
            source=source, indices=indices, confusion_indices=np.union1d(indices, labelled), split="manifest"
        )
    val_fraction = float(checkpoint.run["val_fraction"])
    splits = open_splits(
        settings.data_dir,
        image_size=image_size,
        seed=seed,
        val_fraction=val_fraction,
        on_bad_sample=settings.on_bad_sample,
        index_dir=settings.index_dir,
        shard_cache=shard_cache(settings.shard_cache, settings.shard_cache_gb),
    )
    if splits.synthetic:
        raise UserError(f"`data_dir` {settings.data_dir} holds no data; leave it out to measure on synthetic scenes")
    note = (
        f"the held-out validation split, which chose the checkpoint if it was trained on this data: {_TOO_GOOD}; "
        "`manifest` measures others"
    )
    return MeasuredData(
        source=splits.val,
        indices=splits.val_indices,
        confusion_indices=_not_learned_in_phase3(splits, val_fraction),
        split="val",
        note=note,
        held_out_of=splits.fingerprint,
    )


def _not_learned_in_phase3(splits: DataSplits, val_fraction: float) -> NDArray[np.int64]:
    """What phase 3 chooses its best checkpoint by, as its own run divides the data."""
    source = splits.val
    found = np.union1d(splits.val_indices, source.indices("confused"))
    if source is not splits.train:
        return found
    hashes = source.group_hashes()
    everything = np.union1d(source.indices("target"), source.indices("confused"))
    _, held_out = split_by_hash(hashes[everything], val_fraction)
    found = everything[held_out]
    return found[~learned_in_phase3(hashes[found])]


def _note_on_scenes(settings: EvaluateSettings, checkpoint: Checkpoint) -> str | None:
    if settings.scenes == "val":
        return (
            f"validation scenes, which chose the checkpoint if it was trained on scenes: {_TOO_GOOD}; `scenes` test "
            "measures others"
        )
    fingerprints = [record.fingerprint for _, record in checkpoint.data.of_phases(checkpoint.phase)]
    if settings.scenes == "test" and any(map(may_have_validated_on_test, fingerprints)):
        return f"the checkpoint is from before there was a test split, and some of these scenes chose it: {_TOO_GOOD}"
    return None
