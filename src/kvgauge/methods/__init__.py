"""One file per method: a frozen dataclass that is its configuration, `fit` and `new_cache`.

A method exists as soon as there is a file here and a YAML in `conf/method/` that names its dataclass.
"""
