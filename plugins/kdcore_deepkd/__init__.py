"""DeepKD: splitters of the knowledge, and a momentum for each part."""
