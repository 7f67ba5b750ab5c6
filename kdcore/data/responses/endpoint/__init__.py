"""Models behind an OpenAI-compatible endpoint: their answers, log-probs and samples."""
