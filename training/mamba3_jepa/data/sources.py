"""Opens whatever a data directory holds, and divides it into training and validation samples."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mamba3_jepa.addresses import is_address, shown
from mamba3_jepa.data.content import SplitContent
from mamba3_jepa.data.files import FolderSource, ManifestSource
from mamba3_jepa.data.images import BadSampleError
from mamba3_jepa.data.left_out import LeftOut
from mamba3_jepa.data.remote_shards import RemoteShards
from mamba3_jepa.data.sample import Kind, OnBadSample, Sample, Source, source_texts
from mamba3_jepa.data.scenes import SceneSource, SceneSplit
from mamba3_jepa.data.shard_cache import ShardCache
from mamba3_jepa.data.shards import ShardSource
from mamba3_jepa.data.splits import split_by_hash
from mamba3_jepa.data.survey import Survey, described, nameless_data
from mamba3_jepa.errors import UserError
from mamba3_jepa.files.path_text import path_text

logger = logging.getLogger(__name__)

_FORMS = "manifest.jsonl, no *.tar shards and no image-text pairs (x.jpg + x.txt)"

__all__ = [
    "DataSplits",
    "FolderSource",
    "ManifestSource",
    "Sample",
    "SceneSource",
    "ShardSource",
    "Source",
    "open_source",
    "open_splits",
    "source_texts",
    "usable",
]


@dataclass(frozen=True, kw_only=True)
class DataSplits:
    """Training and validation samples; the two sources are one object where a hash divides it.

    content: what a run that goes on compares; None where nobody has read it, or the data is made up.
    left_out: those of them that passes over the data have found to be bad.
    """

    train: Source
    train_indices: NDArray[np.int64]
    val: Source
    val_indices: NDArray[np.int64]
    content: SplitContent | None = None
    left_out: LeftOut = field(default_factory=LeftOut)

    @property
    def synthetic(self) -> bool:
        return self.train.synthetic

    def origin(self, position: int) -> str:
        """Where a sample comes from, training samples counted first."""
        source, indices = self.train, self.train_indices
        if position >= len(indices):
            source, indices, position = self.val, self.val_indices, position - len(indices)
        try:
            return str(source.sample(int(indices[position])).meta.get("origin", f"sample {position + 1}"))
        except BadSampleError as error:
            return str(error)

    @property
    def fingerprint(self) -> str:
        """Changes when the data does, as far as names and the lines of a manifest tell."""
        return f"{self.train.fingerprint}+{self.val.fingerprint}"


def open_source(
    data_dir: str | Path,
    *,
    manifest: str | Path | None = None,
    on_bad_sample: OnBadSample = "error",
    index_dir: str | Path | None = None,
    shard_cache: ShardCache | None = None,
) -> Source | None:
    """The data in a directory: its `manifest.jsonl`, else its `*.tar` shards, else its image-text pairs.

    Args:
        manifest: another manifest to open instead: the name of one in the directory, such as "test.jsonl", or the path
            of one that lies elsewhere. The files it names are in the directory all the same.
        index_dir: where the indexes of shards are kept (see `ShardSource`); other data has none. By default those of
            shards elsewhere are kept in `shard_cache`.
        shard_cache: where shards are fetched into if `data_dir` is an address.

    What looks like data beside what is read is said, with its number.

    Returns:
        None if nothing in the directory looks like data.

    Raises:
        UserError: there is no such directory, what it holds is malformed, or looks like data and is none of the three.
    """
    if isinstance(data_dir, str) and is_address(data_dir):
        return _open_remote(data_dir, shard_cache, index_dir, on_bad_sample)
    root = Path(data_dir)
    if not root.is_dir():
        found = ": it is a file; give the folder it is in" if root.exists() else ""
        raise UserError(f"`data_dir` {root}: there is no such directory{found}")
    if manifest is not None or os.path.lexists(root / "manifest.jsonl"):
        return ManifestSource(root, _manifest_file(root, manifest or "manifest.jsonl"), on_bad_sample)
    source: ShardSource | FolderSource
    survey = Survey.of(root)
    if survey.n_shards:
        source = ShardSource(root, on_bad_sample, index_dir)
        _say_of_shards(source, survey)
    elif survey.n_images:
        try:
            source = FolderSource(root, on_bad_sample)
        except UserError as error:
            unread = survey.unread(tables=True)
            raise UserError(f"{error}. Not read beside the images: {unread}" if unread else str(error)) from error
    else:
        seen = survey.unread(tables=True) or nameless_data(root)
        if seen:
            raise UserError(f"`data_dir` {root}: no {_FORMS}, but {seen}")
        return None
    _say_left_out(source)
    if unread := survey.unread(tables=bool(source.n_left_out)):
        logger.warning("%s: not read: %s", source.name, unread)
    return source


def _open_remote(
    address: str, cache: ShardCache | None, index_dir: str | Path | None, on_bad_sample: OnBadSample
) -> RemoteShards:
    if cache is None:
        raise UserError(f"`data_dir` {shown(address)}: give `shard_cache` too, a folder to fetch the shards into")
    source = RemoteShards(address, cache, Path(index_dir or cache.folder / "index"), on_bad_sample)
    _say_of_shards(source)
    _say_left_out(source)
    return source


def _manifest_file(root: Path, manifest: str | Path) -> Path:
    """The manifest as `ManifestSource` takes it: one in the data directory, if there is one of that name, or the one
    that this is the path of from here.

    Raises:
        UserError: it is in neither place.
    """
    inside, elsewhere = root / manifest, Path(manifest)
    if os.path.lexists(inside):
        return elsewhere
    if not os.path.lexists(elsewhere):
        tried = " nor ".join(dict.fromkeys(map(str, (inside, elsewhere))))
        raise UserError(f"`manifest`: there is no file {tried}")
    return elsewhere.absolute()


def _say_left_out(source: ShardSource | FolderSource) -> None:
    if source.n_left_out:
        logger.warning("%s: %d images without text left out", source.name, source.n_left_out)
    if source.texts_alone.count:
        logger.warning(
            "%s: %d texts without an image are not used; the first: %s",
            source.name, source.texts_alone.count, path_text(source.texts_alone.first),
        )  # fmt: skip


def _say_of_shards(source: ShardSource, survey: Survey | None = None) -> None:
    """What lies in the shards and beside them without being a sample."""
    if source.n_folders > 1:
        logger.info("%s: the shards of %d folders are one data set", source.name, source.n_folders)
    if source.n_further:
        logger.warning("%s: %d more images of samples that have one already left out", source.name, source.n_further)
    if source.unread:
        logger.warning("%s: not read in the shards: %s", source.name, described(source.unread))
    if source.links.count:
        logger.warning("%s: %d images and texts in the shards are not read, as they are links or have holes: write "
                       "their bytes; the first: %s", source.name, source.links.count, source.links.first)  # fmt: skip
    if source.damaged.count:
        logger.warning("%s: %d damaged shards, of which only what is whole is used; the first: %s",
                       source.name, source.damaged.count, source.damaged.first)  # fmt: skip
    if survey is not None and survey.n_images:
        logger.warning(
            "%s: %d image files beside the shards are not read: a directory with *.tar is read as shards alone",
            source.name, survey.n_images,
        )  # fmt: skip


def open_splits(
    data_dir: str | Path | None,
    *,
    manifest: str | Path | None = None,
    image_size: int,
    seed: int = 0,
    val_fraction: float = 0.02,
    n_scenes: int = 20_000,
    n_val_scenes: int = 256,
    scenes: SceneSplit = "train",
    kind: Kind = "target",
    on_bad_sample: OnBadSample = "error",
    index_dir: str | Path | None = None,
    shard_cache: ShardCache | None = None,
) -> DataSplits:
    """Training and validation samples of one kind.

    Validation samples are those of `val.jsonl`, if it is beside the manifest, which `manifest` names as for
    `open_source`; otherwise a share chosen by the hash of each sample's group. Without data directory, or if it holds
    no data, both are synthetic scenes (`image_size`, `seed`, `n_scenes`, `n_val_scenes` and `scenes`, the split to
    train on, are for them), and a warning says so. `index_dir` and `shard_cache` are those of
    `open_source`.

    Raises:
        UserError: the data is malformed, or one of the two sides would be empty.
    """
    source = None
    if data_dir is not None:
        source = open_source(
            data_dir, manifest=manifest, on_bad_sample=on_bad_sample, index_dir=index_dir, shard_cache=shard_cache
        )
    if source is None:
        _warn_synthetic(data_dir)
        train = SceneSource(scenes, n_scenes=n_scenes, seed=seed, image_size=image_size)
        val = SceneSource("val", n_scenes=n_val_scenes, seed=seed, image_size=image_size)
        return DataSplits(train=train, train_indices=train.indices(kind), val=val, val_indices=val.indices(kind))
    if isinstance(source, ManifestSource) and (separate := _validation(source, on_bad_sample)) is not None:
        _warn_overlap(source, separate)
        return DataSplits(
            train=source,
            train_indices=usable(source, kind),
            val=separate,
            val_indices=usable(separate, kind),
        )
    found = usable(source, kind)
    hashes = source.group_hashes()
    train_part, val_part = split_by_hash(hashes if len(found) == len(source) else hashes[found], val_fraction)
    for name, part, way in (("validation", val_part, "raise"), ("training", train_part, "lower")):
        if not len(part):
            raise UserError(
                f"{source.name}: none of {len(found)} samples falls to the {name} side of the split by hash, as "
                f"samples of one image stay together: {way} `val_fraction` (now {val_fraction}), give more data, or "
                "write a val.jsonl"
            )
    if len(found) < len(source):
        train_part, val_part = found[train_part], found[val_part]
    return DataSplits(train=source, train_indices=train_part, val=source, val_indices=val_part)


def _validation(source: ManifestSource, on_bad_sample: OnBadSample) -> ManifestSource | None:
    """The `val.jsonl` beside a manifest; None where there is none."""
    beside = source.path.with_name("val.jsonl")
    if beside == source.path or not beside.exists():
        return None
    file = beside.relative_to(source.root) if beside.is_relative_to(source.root) else beside.absolute()
    return ManifestSource(source.root, file, on_bad_sample)


def usable(source: Source, kind: Kind = "target") -> NDArray[np.int64]:
    """The indices of the samples of one kind; says how many others there are, and what they are.

    Raises:
        UserError: there are none of that kind.
    """
    found = source.indices(kind)
    n_confused = len(source.indices("confusing")) if kind == "target" else 0
    what = "an answer or a text" if kind == "target" else f'what "{kind}" needs'
    n_without = len(source) - len(found) - n_confused
    reasons = [f"{n_without} without {what}"] if n_without else []
    reasons += [f'{n_confused} with "confused": true'] if n_confused else []
    if not len(found):
        aside = f' (but for {n_confused} with "confused": true, which only phase 3 learns from)' if n_confused else ""
        raise UserError(f"{source.name}: none of the {len(source)} samples has {what}{aside}")
    if reasons:
        logger.warning("%s: %d of %d samples left out: %s", source.name, len(source) - len(found), len(source),
                       ", ".join(reasons))  # fmt: skip
    return found


def _warn_synthetic(data_dir: str | Path | None) -> None:
    if data_dir is None:
        logger.warning("no `data_dir`: training on SYNTHETIC scenes (coloured shapes), not on real data")
    else:
        logger.warning(
            "%s holds no %s: training on SYNTHETIC scenes (coloured shapes), not on real data",
            data_dir,
            _FORMS,
        )


def _warn_overlap(train: Source, val: Source) -> None:
    shared = len(np.intersect1d(train.group_hashes(), val.group_hashes()))
    if shared:
        logger.warning(
            "%d images or queries of %s are in %s too: validation will look better than it is",
            shared,
            val.name,
            train.name,
        )
