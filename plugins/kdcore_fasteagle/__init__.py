"""FastEagle: a drafter whose cascaded layers draft every position in one pass."""
