"""From examples to batches: conversations, masks, generated responses. No source lives here."""
