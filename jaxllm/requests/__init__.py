"""What users give and get, as plain Python: prompts, sampling parameters, outputs, and the checks of them."""
