"""An engine that runs the target through torch.compile, on CUDA as CUDA graphs."""
