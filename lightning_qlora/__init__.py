"""QLoRA fine-tuning of causal language models as an ordinary PyTorch Lightning job."""
