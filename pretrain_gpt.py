"""Pretrain an autoregressive (causal) GPT: ``python pretrain_gpt.py --help`` lists the flags."""

from megatron.entry import main
from megatron.initialize import leave

if __name__ == "__main__":
    leave(main("ar"))
