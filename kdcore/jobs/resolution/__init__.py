"""A spec made ready to run: models, rows, caches, teachers. check, run and cache share it."""
