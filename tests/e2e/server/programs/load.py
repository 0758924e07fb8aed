"""What the load tools share: a tokenizer that needs no network, and an environment in which none is used."""

import os
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def write_tokenizer(folder: Path) -> str:
    """A tokenizer for which every byte is a token; where it is."""
    names = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<s>", "</s>"]
    made = Tokenizer(models.BPE(vocab={name: number for number, name in enumerate(names)}, merges=[]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return str(folder)


def offline(home: str) -> dict[str, str]:
    """An environment with a home of its own, whose hub is an address where nobody listens."""
    return {**os.environ, "HOME": home, "HF_HOME": home, "HF_ENDPOINT": "http://127.0.0.1:9"}
