"""Training over packed layers: PEFT's adapters, merging them, and the codebooks themselves."""
