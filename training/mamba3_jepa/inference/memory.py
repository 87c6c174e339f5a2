"""A small memory: texts with their Y-Encoder embeddings, looked up by cosine.

Shape letters: M texts, B queries, E embedding width.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from mamba3_jepa.contract import MEMORY_FORMAT, MEMORY_FORMAT_VERSION
from mamba3_jepa.errors import UserError
from mamba3_jepa.evaluation.retrieval import top_texts
from mamba3_jepa.files.lines import read_lines
from mamba3_jepa.files.safetensors_file import dtype_name, open_safetensors, write_safetensors
from mamba3_jepa.inference.embeddings import embed_texts
from mamba3_jepa.models.key_map import exported_tensors
from mamba3_jepa.models.vljepa import Mamba3Jepa

_TENSOR = "embeddings"


class KnowledgeMemory:
    """M different texts and their embeddings (M, E) of unit length.

    encoder: digest of the text encoder that made the embeddings, see `encoder_digest`.
    """

    def __init__(self, texts: Sequence[str], embeddings: Tensor, encoder: str) -> None:
        if embeddings.ndim != 2 or len(texts) != len(embeddings) or not texts:
            raise ValueError(f"expected M > 0 texts and (M, E), found {len(texts)} and {tuple(embeddings.shape)}")
        self.texts, self.embeddings, self.encoder = list(texts), embeddings.float().cpu(), encoder

    def __len__(self) -> int:
        return len(self.texts)

    @classmethod
    def build(cls, model: Mamba3Jepa, texts: Sequence[str]) -> KnowledgeMemory:
        """Embed texts; of equal ones the first is kept.

        Raises:
            UserError: no text, or an empty one; an embedding is not finite.
        """
        texts = list(dict.fromkeys(texts))
        return cls(texts, embed_texts(model, texts).embeddings, encoder_digest(model))

    @classmethod
    def open(cls, path: str | Path, model: Mamba3Jepa) -> KnowledgeMemory:
        """A saved memory (`.safetensors`), or a text file with one text a line, which is embedded now.

        Raises:
            UserError: see `load`; or the text file is missing, empty or not UTF-8.
        """
        if Path(path).suffix == ".safetensors":
            return cls.load(path, model)
        return cls.build(model, read_lines(path, "text to remember"))

    def search(self, embedding: Tensor, k: int = 5) -> list[list[tuple[str, float]]]:
        """For each of B embeddings (B, E) the k nearest texts with their cosines, nearest first."""
        return top_texts(embedding.float().cpu(), self.embeddings, self.texts, k)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, whole or not at all.

        Raises:
            UserError: it cannot be written.
        """
        metadata = {
            "format": MEMORY_FORMAT,
            "format_version": MEMORY_FORMAT_VERSION,
            "encoder": self.encoder,
            "texts": json.dumps(self.texts, ensure_ascii=False),
        }
        write_safetensors(Path(path), {_TENSOR: self.embeddings}, metadata)

    @classmethod
    def load(cls, path: str | Path, model: Mamba3Jepa) -> KnowledgeMemory:
        """Read a saved memory that this model's Y-Encoder made.

        Raises:
            UserError: the file is missing, damaged, no memory, or was made with other weights.
        """
        try:
            with open_safetensors(path) as file:
                metadata = file.metadata() or {}
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: cannot read it as a saved memory: {error}") from error
        if metadata.get("format") != MEMORY_FORMAT:
            raise UserError(f"{path}: not a saved memory; make one with ask `save_memory`")
        version = metadata.get("format_version")
        if version != MEMORY_FORMAT_VERSION:
            raise UserError(
                f"{path}: a saved memory of format {version}, this version reads {MEMORY_FORMAT_VERSION}; make it "
                "again from its texts: ask `memory` TEXTS.txt `save_memory` FILE"
            )
        if metadata.get("encoder") != encoder_digest(model):
            raise UserError(
                f"{path}: made with another Y-Encoder or tokenizer, so its embeddings mean nothing to this model; "
                "make it again from its texts"
            )
        texts, embeddings = _texts(metadata.get("texts", "")), found.get(_TENSOR)
        shape = (len(texts), model.config.embed_dim)
        if not texts or embeddings is None or not _is_finite_float32(embeddings, shape):
            raise UserError(f"{path}: damaged: expected {shape[0]} texts and finite F32 embeddings of shape {shape}")
        return cls(texts, embeddings, metadata["encoder"])


def encoder_digest(model: Mamba3Jepa) -> str:
    """SHA-256 in hex of everything a text's embedding depends on: token limit, sizes, tokenizer and weights.

    WEIGHT_MAPPING.md says what is hashed. An exported folder in float32 has the digest of the checkpoint it came from;
    one in 16 bits has its own, because its embeddings differ.
    """
    config = model.config
    sizes = {"max_answer_tokens": config.max_answer_tokens, "y_encoder": config.to_dict()["y_encoder"]}
    canonical = json.dumps(sizes, sort_keys=True, separators=(",", ":"))
    tokenizer = sha256(model.tokenizer.to_json().encode()).hexdigest()
    digest = sha256(f"mamba3-jepa y_encoder\n{canonical}\n{tokenizer}\n".encode())
    tensors = exported_tensors(model.state_dict(), "y_encoder", config, source="the model")
    for key, tensor in sorted(tensors.items()):
        shape = "x".join(map(str, tensor.shape))
        digest.update(f"{key} {dtype_name(tensor.dtype)} {shape}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _is_finite_float32(embeddings: Tensor, shape: tuple[int, int]) -> bool:
    return embeddings.dtype == torch.float32 and embeddings.shape == shape and bool(embeddings.isfinite().all())


def _texts(value: str) -> list[str]:
    """The texts of a JSON list; none where it is no such list, or says half a character (`\\ud800`)."""
    try:
        texts = json.loads(value)
        json.dumps(texts, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return []
    return texts if isinstance(texts, list) and all(isinstance(text, str) for text in texts) else []
