"""FastEagle: a drafter that proposes all its tokens in one pass."""
