"""The passes: each file is one pass, a frozen dataclass with a `name`, options as fields, and `apply(program)`."""
