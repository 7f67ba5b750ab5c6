"""Loading of models: from folders and hubs, cut, new, with adapters, on their devices."""
