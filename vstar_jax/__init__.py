"""Video-STAR in JAX: open-vocabulary action recognition with tools, trained by SFT and GRPO."""
