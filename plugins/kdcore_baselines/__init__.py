"""The methods that every other one is compared with."""
