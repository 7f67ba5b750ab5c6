"""The sections that the specs of several jobs share."""
