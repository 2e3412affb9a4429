"""moe_comm inside other people's frameworks: one file per framework, imported only when asked for.

Importing this package imports no framework. transformers, megatron and torchtitan raise ImportError with the version
they need when the framework is missing or too old, and share buffers.py. vllm and sglang are plug-ins, which those
frameworks find themselves; they import neither.
"""
