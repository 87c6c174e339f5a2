"""Settings of `mamba3-jepa bench layer`. Free of torch, so that --help answers at once."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LayerBenchmarkSettings:
    """Time one Mamba-3 layer, forward and backward, beside its own two linear maps and other
    implementations."""

    d_model: int = 1024
    """Width of the layer."""
    d_state: int = 128
    """State size per head."""
    headdim: int = 64
    """Size of a head."""
    batch: int = 2
    """Sequences at a time."""
    length: int = 320
    """Tokens per sequence."""
    chunk_size: int = 64
    """Tokens per chunk at most."""
    threads: int = 2
    """CPU threads of torch."""
    rounds: int = 9
    """Rounds; in each every candidate runs once, and the median over the rounds counts."""
    device: str = "cpu"
    """Where to compute: cpu, cuda, cuda:1, mps."""
    bfloat16: bool = False
    """Run under bfloat16 autocast, which on CUDA lets mamba-ssm's fused kernels in; float32 otherwise."""
    compiled: bool = True
    """Also time the layer under torch.compile."""
    sequential: bool = True
    """Also time the token-by-token reference (slow)."""
    packages: bool = True
    """Also time mamba-ssm (CUDA only), mamba3-ssm and mamba3-jax, those of them that are installed."""
    scaling_lengths: tuple[int, ...] = (1024, 2048, 4096, 8192)
    """Lengths at which to measure time and peak memory of one sequence; none leaves that out."""
