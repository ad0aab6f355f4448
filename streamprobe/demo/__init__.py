"""The embedded default: a search task in plain words, a tiny model trained on it, and the script that trained it.

    from transformers import AutoModelForCausalLM
    from streamprobe import demo

    model = AutoModelForCausalLM.from_pretrained(demo.MODEL)

`MODEL` is the folder of the model and its tokenizer, `CHAINS` the JSON file of 500 annotated chains.
"""

from pathlib import Path

MODEL = Path(__file__).with_name("model")
CHAINS = Path(__file__).with_name("chains.json")
