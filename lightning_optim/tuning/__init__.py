"""What comes before training: which optimizer, which rate, and whether the model can learn at all."""
