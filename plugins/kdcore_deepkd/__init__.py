"""DeepKD: splitters of the distillation loss, and a momentum for each part."""
