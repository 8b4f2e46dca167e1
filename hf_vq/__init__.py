"""hf_vq: extreme compression of language models, as a plugin for HuggingFace Transformers."""

__version__ = "0.1.0"
