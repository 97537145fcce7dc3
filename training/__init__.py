"""Trains and fine-tunes MoE checkpoints: transformers' models, accelerate's devices, a Hugging Face folder out."""
