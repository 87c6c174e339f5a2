"""What a trained model is worth: metrics, plots, contact sheets."""
