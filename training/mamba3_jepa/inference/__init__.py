"""Using a trained model: answering, embedding, searching."""
