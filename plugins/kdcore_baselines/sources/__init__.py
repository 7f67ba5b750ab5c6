"""Data sources: files, Hugging Face datasets and the digits of scikit-learn."""
