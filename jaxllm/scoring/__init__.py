"""Log-probabilities of continuations, with what they share computed once."""
