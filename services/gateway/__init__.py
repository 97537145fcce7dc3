"""HTTP in, text out: OpenAI's API in front of the bus."""
