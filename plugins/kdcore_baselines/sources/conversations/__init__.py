"""Conversations from rows of data: recognition of the fields, selection, ids."""
