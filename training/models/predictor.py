"""The Mamba-3 predictor."""

from mamba3_jepa.models.predictor import Predictor, PredictorOutput

__all__ = ["Predictor", "PredictorOutput"]
