"""Gates that select tokens by a schedule of their own: AdaKD and SE-KD."""
