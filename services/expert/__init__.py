"""Expert workers: the routed experts' weights behind a queue group."""
