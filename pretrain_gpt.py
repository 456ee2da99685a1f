"""Pretrain an autoregressive (causal) GPT: ``python pretrain_gpt.py --help`` lists the flags."""

from megatron.initialize import leave
from megatron.training import main

if __name__ == "__main__":
    leave(main("ar"))
