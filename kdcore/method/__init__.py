"""The heart: records and Protocols of training, the objective and the loss engine."""
