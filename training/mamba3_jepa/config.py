"""Model configuration: frozen dataclasses, validated when built, saved whole into every checkpoint.

Unknown keys, wrong types and impossible sizes are errors at construction, so that a config that exists is a
config that works. `preset(name)` gives the three sizes the project ships.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal, cast

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from mamba3_jepa.errors import UserError

PresetName = Literal["small", "mini", "tiny"]
VisionKind = Literal["vjepa2", "vjepa2.1"]
AActivation = Literal["heavy_tail", "softplus"]
KernelUse = Literal["auto", "off", "require"]  # of the fused kernels, see `models.fused`
Order = Literal["visual_question", "question_visual", "question_visual_question"]
Part = Literal["visual", "question"]
Pooling = Literal["all", "attention", "question", "last"]

QUERY_PROMPT = "Describe the image."  # what an image without a question is asked, unless the configuration says else

_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)

# Beyond these no machine goes; a size that is a slip of the hand is refused before memory is asked for it.
LARGEST_SIZE, MOST_LAYERS = 10_000_000, 10_000

MLP_MULTIPLE = 128
BACKBONES = ("predictor", "y_encoder", "y_decoder")
_AS_BEFORE = {
    "mlp_dim": 0, "order": "visual_question", "pooling": "all", "bidirectional": False, "visual_pool": 1,
    "hears_answer": False,
    "injector_sees_state": False, "retriever_dim": 0, "episodes": False, "episode_key": "state",
    "weighs_knowledge": False, "tools": [],
}  # fmt: skip

LONGEST_TOOL_NAME = 64

SHUT = 2.0  # no cosine is that high: as a floor it keeps everything out
NO_FLOOR = -1.0  # the lowest cosine there is: as a floor it keeps nothing out
PICTURE_CELLS = 4  # an episode's picture is known by its quarters


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Mamba3Config:
    """One Mamba-3 layer; the names are the constructor arguments of `models.mamba3.Mamba3`."""

    d_model: int = Field(gt=0, le=LARGEST_SIZE)
    d_state: int = Field(default=128, gt=0, le=LARGEST_SIZE)
    expand: int = Field(default=2, gt=0, le=LARGEST_SIZE)
    headdim: int = Field(default=64, gt=0, le=LARGEST_SIZE)
    ngroups: int = Field(default=1, gt=0, le=LARGEST_SIZE)
    rope_fraction: float = 0.5
    a_activation: AActivation = "heavy_tail"
    is_mimo: bool = False
    mimo_rank: int = Field(default=4, gt=0, le=LARGEST_SIZE)
    is_outproj_norm: bool = False
    chunk_size: int = Field(default=64, gt=0, le=LARGEST_SIZE)

    def check(self, name: str) -> None:
        """Whether the sizes go together.

        Raises:
            UserError: they do not; begins with `name`.
        """
        d_inner, d_state = self.expand * self.d_model, self.d_state
        if d_inner % self.headdim:
            raise UserError(f"{name}: expand * d_model = {d_inner} is not a multiple of headdim {self.headdim}")
        if d_inner // self.headdim % self.ngroups:
            heads = d_inner // self.headdim
            raise UserError(f"{name}: {heads} heads are not a multiple of ngroups {self.ngroups}")
        if self.rope_fraction not in (0.5, 1.0):
            raise UserError(f"{name}: rope_fraction is {self.rope_fraction}, it must be 0.5 or 1.0")
        if int(d_state * self.rope_fraction) < 2:
            raise UserError(f"{name}: d_state {d_state} leaves no pair to rotate; make it at least 4")
        if self.is_mimo and d_state % 2:
            raise UserError(f"{name}: MIMO needs an even d_state, not {d_state}")


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class BackboneConfig:
    """A pre-norm residual stack of `n_layers` equal Mamba-3 layers, and where wanted a gated MLP after each."""

    n_layers: int = Field(gt=0, le=MOST_LAYERS)
    layer: Mamba3Config
    mlp_dim: int = Field(default=0, ge=0, le=LARGEST_SIZE)
    """Hidden width of the MLPs, before it is rounded up; 0: there are none."""

    @property
    def d_model(self) -> int:
        return self.layer.d_model

    @property
    def mlp_width(self) -> int:
        """Hidden width of the MLPs as it is: `mlp_dim` rounded up to a multiple of 128, as mamba-ssm does."""
        return -(-self.mlp_dim // MLP_MULTIPLE) * MLP_MULTIPLE


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class PredictorConfig(BackboneConfig):
    """The predictor: its backbone, in which order it reads picture and question, and how their states are pooled.

    The defaults are what there was before there was a choice, so that older files are read as what they are.
    """

    order: Order = "visual_question"
    """What it reads, first to last. It reads causally: a state knows what stands before it."""
    pooling: Pooling = "all"
    """Of which positions the pooled state is the mean: of all, of all with learned weights, of the last question, or of
    the last position alone."""
    bidirectional: bool = False
    """A second scan, from the right, in every layer, with weights of its own. Such a predictor cannot stream."""
    visual_pool: int = Field(default=1, gt=0, le=LARGEST_SIZE)
    """It reads the mean of so many by so many neighbouring visual tokens as one; 1: each by itself."""

    @property
    def parts(self) -> list[Part]:
        """What it reads, first to last."""
        return cast(list[Part], self.order.split("_"))

    def __post_init__(self) -> None:
        if self.pooling == "question" and self.order == "question_visual" and not self.bidirectional:
            raise UserError("predictor: with order question_visual, pooling question would never see the picture")


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class VisionConfig:
    """The X-Encoder: a V-JEPA 2 or 2.1 vision transformer. Sizes in pixels and frames."""

    kind: VisionKind = "vjepa2"
    """Which of the two: 2.1 has an image branch, modality vectors and other rotary angles (`models.vjepa21`,
    `models.vision_parts`)."""
    hidden_size: int = Field(default=1024, gt=0, le=LARGEST_SIZE)
    depth: int = Field(default=24, gt=0, le=MOST_LAYERS)
    heads: int = Field(default=16, gt=0, le=LARGEST_SIZE)
    mlp_ratio: float = Field(default=4.0, gt=0)
    image_size: int = Field(default=256, gt=0, le=LARGEST_SIZE)
    patch_size: int = Field(default=16, gt=0, le=LARGEST_SIZE)
    tubelet_size: int = Field(default=2, gt=0, le=LARGEST_SIZE)
    frames: int = Field(default=64, gt=0, le=LARGEST_SIZE)
    pretrained: bool = False
    """Whether the weights come from a file, rather than from chance; it travels with them through the phases."""

    def __post_init__(self) -> None:
        if int(self.hidden_size * self.mlp_ratio) < 1:
            raise UserError(f"vision: mlp_ratio {self.mlp_ratio} leaves no width to the MLP of {self.hidden_size}")
        if self.hidden_size % self.heads:
            raise UserError(f"vision: hidden_size {self.hidden_size} is not a multiple of heads {self.heads}")
        if self.image_size % self.patch_size:
            raise UserError(f"vision: image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")

    @property
    def n_tokens(self) -> int:
        """Visual tokens of one image: those of one tubelet, or of the image branch."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def image_frames(self) -> int:
        """Frames of an image as the X-Encoder sees it: a tubelet of equal ones, or one for an image branch."""
        return 1 if self.kind == "vjepa2.1" else self.tubelet_size


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class AngnConfig:
    """Adaptive neural gating of the predictor's residual stream."""

    enabled: bool = False
    sparsity_weight: float = Field(default=0.01, ge=0)
    context_reset_threshold: float = Field(default=0.3, ge=0, le=1)
    ema_decay: float = Field(default=0.99, ge=0, lt=1)


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class RecursionConfig:
    """The confusion monitor and the state injector on the predictor's pooled state."""

    hidden_dim: int = Field(default=256, gt=0, le=LARGEST_SIZE)
    """Width of the hidden layers: of the confusion probe and of the other parts that have one."""
    knowledge_dim: int | None = Field(default=None, gt=0, le=LARGEST_SIZE)
    """Length of a knowledge vector; None: `embed_dim`, what the Y-Encoder gives."""
    ema_decay: float = Field(default=0.9, ge=0, lt=1)
    """How much of the smoothed confusion score of a question stays when it is asked again."""
    hears_answer: bool = False
    """Whether the monitor is told how improbable the Y-Decoder found its own answer, beside the pooled state."""
    injector_sees_state: bool = False
    """Whether what knowledge adds to the pooled state depends on that state, and so on what was asked."""
    retriever_dim: int = Field(default=0, ge=0, le=LARGEST_SIZE)
    """Width in which questions find the texts of a memory; 0: the predicted embedding looks for them."""
    episodes: bool = False
    """Whether a memory may hold episodes, pictures and questions seen before with their answers, beside texts."""
    episode_key: Literal["state", "picture"] = "state"
    """What an episode is found by beside its question: the pooled state, or what its picture looks like."""
    weighs_knowledge: bool = False
    """Whether it is judged if what the model was told answers the question, so that it can stay confused."""
    tools: list[Annotated[str, Field(min_length=1, max_length=LONGEST_TOOL_NAME)]] = Field(default_factory=list)
    """Names of the tools that a selector chooses among; phase 3 takes them from its data's "tool_used"."""

    def __post_init__(self) -> None:
        if len(set(self.tools)) < len(self.tools):
            raise UserError(f"recursion.tools: a name is there twice: {', '.join(self.tools)}")


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class ModelConfig:
    """Everything that decides the shape and the meaning of the weights."""

    preset: PresetName
    vision: VisionConfig
    predictor: PredictorConfig
    y_encoder: BackboneConfig
    y_decoder: BackboneConfig
    prefix_tokens: int = Field(default=8, gt=0, le=LARGEST_SIZE)
    embed_dim: int = Field(default=1536, gt=0, le=LARGEST_SIZE)
    vocab_size: int = Field(default=32_000, gt=0, le=LARGEST_SIZE)
    max_query_tokens: int = Field(default=64, gt=1, le=LARGEST_SIZE)
    max_answer_tokens: int = Field(default=64, gt=1, le=LARGEST_SIZE)
    query_prompt: str = Field(default=QUERY_PROMPT, min_length=1)
    angn: AngnConfig = Field(default_factory=AngnConfig)
    recursion: RecursionConfig = Field(default_factory=RecursionConfig)

    def __post_init__(self) -> None:
        for name in BACKBONES:
            backbone: BackboneConfig = getattr(self, name)
            backbone.layer.check(f"{name}.layer")
        if not self.query_prompt.strip():
            raise UserError("query_prompt: it is empty")
        self._demand_poolable()

    def _demand_poolable(self) -> None:
        side, pool = self.vision.image_size // self.vision.patch_size, self.predictor.visual_pool
        if side % pool:
            raise UserError(
                f"predictor: visual_pool {pool} does not divide the {side} x {side} visual tokens of a picture"
            )
        if 1 < pool == side and self.recursion.episodes and self.recursion.episode_key == "picture":
            raise UserError(
                f"predictor: visual_pool {pool} leaves one visual token of a picture, and episodes tell its quarters "
                "apart (recursion.episode_key picture): take smaller patches, or recursion.episode_key state"
            )

    @property
    def visual_tokens(self) -> int:
        """Visual tokens of one image as the predictor reads them."""
        return self.vision.n_tokens // self.predictor.visual_pool**2

    @property
    def knowledge_dim(self) -> int:
        """Length of a knowledge vector."""
        return self.recursion.knowledge_dim or self.embed_dim

    @property
    def episode_dim(self) -> int:
        """Length of what an episode is found by beside its question."""
        by_picture = self.recursion.episode_key == "picture"
        return PICTURE_CELLS * self.vision.hidden_size if by_picture else self.predictor.d_model

    def replace(self, **changes: Any) -> ModelConfig:
        """A copy with some fields changed, validated again."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready dictionaries, as files hold them.

        Choices that came later are left out where they change nothing: every file, digest and reader stays as it was.
        """
        values = dataclasses.asdict(self)
        for name in (*BACKBONES, "recursion"):
            values[name] = {key: value for key, value in values[name].items() if _AS_BEFORE.get(key) != value}
        return values

    @staticmethod
    def from_dict(values: dict[str, Any], source: str = "config") -> ModelConfig:
        """The inverse of `to_dict`.

        Raises:
            UserError: a key is unknown or missing, or a value has the wrong type; names `source` and the key.
        """
        try:
            return _MODEL_CONFIG.validate_python(values)
        except ValidationError as error:
            raise _invalid(source, error) from error

    @staticmethod
    def from_json(text: str, source: str = "config") -> ModelConfig:
        """`from_dict` for JSON, in which every value must have its type: no true for an int, no text for a number.

        Raises:
            UserError: as `from_dict`; sizes that do not go together.
        """
        try:
            return _MODEL_CONFIG.validate_json(text, strict=True)
        except ValidationError as error:
            raise _invalid(source, error) from error
        except UserError as error:
            raise UserError(f"{source}: {error}") from error


_MODEL_CONFIG = TypeAdapter(ModelConfig)


def _invalid(source: str, error: ValidationError) -> UserError:
    problems = "; ".join(f"{'.'.join(str(part) for part in item['loc'])}: {item['msg']}" for item in error.errors())
    return UserError(f"{source}: not a valid model configuration: {problems}")


def _backbone(n_layers: int, d_model: int, d_state: int, headdim: int) -> BackboneConfig:
    return BackboneConfig(n_layers=n_layers, layer=Mamba3Config(d_model=d_model, d_state=d_state, headdim=headdim))


def _predictor(n_layers: int, d_model: int, d_state: int, headdim: int) -> PredictorConfig:
    backbone = _backbone(n_layers, d_model, d_state, headdim)
    return PredictorConfig(n_layers=n_layers, layer=backbone.layer, order="question_visual", pooling="attention")


_RECURSION = RecursionConfig(
    hears_answer=True,
    injector_sees_state=True,
    retriever_dim=64,
    episodes=True,
    episode_key="picture",
    weighs_knowledge=True,
)


def preset(name: PresetName) -> ModelConfig:
    """The named size: `small` (full size), `mini` (learns on a laptop), `tiny` (seconds, for tests)."""
    if name == "small":
        return ModelConfig(
            preset="small",
            vision=VisionConfig(),
            predictor=_predictor(12, 1024, 128, 64),
            recursion=_RECURSION,
            y_encoder=_backbone(12, 768, 64, 32),
            y_decoder=_backbone(6, 512, 64, 32),
        )
    if name == "mini":
        return ModelConfig(
            preset="mini",
            vision=VisionConfig(hidden_size=384, depth=1, heads=6, image_size=64, patch_size=32, frames=2),
            predictor=_predictor(4, 128, 32, 32),
            recursion=_RECURSION,
            y_encoder=_backbone(2, 128, 32, 32),
            y_decoder=_backbone(2, 128, 32, 32),
            prefix_tokens=8,
            embed_dim=128,
            vocab_size=1024,
            max_query_tokens=32,
            max_answer_tokens=32,
        )
    if name == "tiny":
        return ModelConfig(
            preset="tiny",
            vision=VisionConfig(hidden_size=64, depth=2, heads=1, image_size=32, patch_size=8, frames=2),
            predictor=_predictor(2, 64, 16, 16),
            recursion=_RECURSION,
            y_encoder=_backbone(2, 64, 16, 16),
            y_decoder=_backbone(2, 64, 16, 16),
            prefix_tokens=4,
            embed_dim=32,
            vocab_size=512,
            max_query_tokens=32,
            max_answer_tokens=32,
        )
    raise UserError(f"unknown preset {name!r}: choose small, mini or tiny")
