"""selfsup: self-supervised pretraining from scratch. Start reading at `train.py`."""

__version__ = "0.1.0"
