"""Job for kdcore that counts the tokens of a data source."""
