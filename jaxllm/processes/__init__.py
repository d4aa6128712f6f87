"""Several processes that run one model: how they meet, what they tell each other, and what becomes of them when one ends."""
