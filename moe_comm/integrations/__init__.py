"""moe_comm inside other people's frameworks: one file per framework, imported only when asked for.

Importing this package imports no framework. Each module raises ImportError with the version it needs when the
framework is missing or too old.
"""
