"""FastEagle: a drafter that proposes all of its tokens in one pass."""
