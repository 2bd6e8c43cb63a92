"""One folder per family: dataclass, fit and storage side by side.

A method exists as soon as a YAML in `conf/method/` names it."""
