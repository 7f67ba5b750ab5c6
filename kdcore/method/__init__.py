"""The heart: records, Protocols, hooks, the objective and the loss engine. Imports errors alone."""
