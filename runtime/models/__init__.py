"""From a checkpoint (Hugging Face directory or GGUF file) to one ModelSpec, its tensors and its tokenizer."""
