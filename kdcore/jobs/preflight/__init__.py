"""What a job would do and cost, found out without training."""
