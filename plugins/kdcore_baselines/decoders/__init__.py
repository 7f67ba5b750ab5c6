"""What people decode with otherwise: `generate` of transformers, and llama.cpp."""
