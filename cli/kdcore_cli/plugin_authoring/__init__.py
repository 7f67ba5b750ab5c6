"""Commands for authors of plugins: a starter package, and its checks."""
