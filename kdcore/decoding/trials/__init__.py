"""Trials before decoding: what a round costs on this machine, and whether trees keep the logits."""
