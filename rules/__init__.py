"""The library of rules: one YAML file a method, and the functional forms they name in `forms/`."""
