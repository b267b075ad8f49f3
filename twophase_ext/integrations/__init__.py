"""Callbacks for other trainers; importing this package imports none of them.

lightning.py: `TwoPhaseCallback` for Lightning. huggingface.py: the same for transformers.
switch.py: what they share.
"""
