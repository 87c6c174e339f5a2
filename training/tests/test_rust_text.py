"""A language model's tokens in, logits out, in Rust as they are known from the official layout.

`make test` builds the crate's example `decoder_logits`, in the folder `examples` beside the command that it names in
KORE_VLJEPA; without that these tests are skipped.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_model
from tiny_language_model import FIXTURE, language_model
from torch import Tensor

from mamba3_jepa.export.writer import write_component
from mamba3_jepa.models.language_model import Mamba3LanguageModel

pytestmark = pytest.mark.skipif("KORE_VLJEPA" not in os.environ, reason="the Rust half is not built: make test")


@torch.no_grad()
def rust_logits(source: Mamba3LanguageModel, ids: Tensor, folder: Path) -> Tensor:
    """(B, L, V) of Rust's decoder with the weights of `source`, after a prefix of zeros, which moves no state."""
    model = tiny_model(phase=2, y_decoder=source.config.backbone)
    decoder, rows = model.y_decoder, len(source.embedding.weight)
    assert decoder is not None
    decoder.backbone.load_state_dict(source.backbone.state_dict())
    decoder.embedding.weight[:rows], decoder.lm_head.weight[:rows] = source.embedding.weight, source.head
    decoder.embed_to_prefix.weight.zero_()
    decoder.embed_to_prefix.bias.zero_()
    write_component(model, "y_decoder", folder / "y_decoder.safetensors", phase=2)
    embedding = torch.randn(len(ids), model.config.embed_dim)
    save_file({"ids": ids, "embedding": embedding}, folder / "texts.safetensors")
    command = Path(os.environ["KORE_VLJEPA"]).parent / "examples" / "decoder_logits"
    files = [folder / f"{name}.safetensors" for name in ("y_decoder", "texts", "logits")]
    result = subprocess.run([command, *files], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return load_file(folder / "logits.safetensors")["logits"][..., :rows]


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert (found - expected).norm() < 1e-5 * expected.norm()


def test_the_reference_implementation(tmp_path: Path) -> None:
    expected = load_file(FIXTURE / "expected.safetensors")
    source = Mamba3LanguageModel.from_pretrained(FIXTURE)
    assert_close(rust_logits(source, expected["ids"], tmp_path), expected["logits"])


@pytest.mark.parametrize("changes", [{"tied": False, "is_mimo": True, "mimo_rank": 3}, {"a_activation": "softplus"}])
@torch.no_grad()
def test_other_kinds(tmp_path: Path, changes: dict) -> None:
    source = language_model(200, mlp_dim=130, **changes)
    ids = torch.randint(0, 200, (3, 19))
    assert_close(rust_logits(source, ids, tmp_path), source(ids))
