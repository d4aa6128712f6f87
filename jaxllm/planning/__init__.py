"""What a model needs on given devices, before it is loaded: layouts, memory, time."""
