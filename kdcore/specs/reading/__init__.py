"""From a YAML file to a spec, and its mistakes told by file and line."""
