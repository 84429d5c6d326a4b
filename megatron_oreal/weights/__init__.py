"""Names, shapes and streams of weights: the tables that map Hugging Face to Megatron."""
