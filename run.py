"""Train linear probes for every layer and every lag while the language model runs.

python run.py                                                             # configs/demo.yaml: a small model, no network
python run.py configs/llama-3.1-8b.yaml                                   # the original experiment
python run.py configs/llama-3.1-8b.yaml --layers 12 16 --lags 0 8 24      # swap layers and lags
python run.py configs/llama-3.1-8b.yaml --resume                          # go on after a crash
python run.py --help                                                      # every key
tensorboard --logdir runs                                                 # watch

Installed, `streamprobe train` is the same, and `streamprobe --help` lists what else there is.
"""

import sys

from streamprobe.cli import train

if __name__ == "__main__":
    sys.exit(train())
