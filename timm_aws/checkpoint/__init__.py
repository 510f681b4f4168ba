"""Checkpoint folders: from a run of timm's train.py to a repository on the Hugging Face Hub, and back into timm."""
