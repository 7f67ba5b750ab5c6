"""What the sources share that read through Hugging Face datasets."""
