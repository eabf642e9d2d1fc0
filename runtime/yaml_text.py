"""Settings as YAML."""

from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """Refuses a setting that is written twice: the last one would hold, and nobody would be told."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Here nothing has been merged into the mapping yet: it is as it was written.
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise yaml.MarkedYAMLError(None, None, f"{key.value} is set twice", key.start_mark)
            seen.add(key.value)
        return node


def read_yaml(text: str) -> Any:
    """What the text says, in Python's own types. Raises ValueError, also for a key that is written twice."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None
