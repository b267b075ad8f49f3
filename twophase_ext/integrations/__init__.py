"""Callbacks for other trainers, and estimators; importing this package imports none of them.

lightning.py: `TwoPhaseCallback` for Lightning. huggingface.py: the same for transformers.
transition.py: what they share. scikit.py: estimators of scikit-learn, `twophase_ext.sklearn`.
"""
