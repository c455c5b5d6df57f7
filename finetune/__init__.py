"""Fine-tune language models with LoRA, sweep any setting, evaluate honestly."""
