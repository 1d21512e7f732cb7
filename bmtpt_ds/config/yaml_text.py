"""YAML as people write it: `1e5` is a number, a key given twice is a mistake, errors name the line."""

import re
from typing import Any

import yaml

from bmtpt_ds.errors import UserError

_MERGE = "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads `1e5` and `1e-3` as numbers and refuses a key that is given twice."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        # as it stands in the text, before `<<: *anchor` adds keys that its neighbours may replace
        node = super().compose_mapping_node(anchor)
        keys = ["<<" if key.tag == _MERGE else self.construct_object(key, deep=True) for key, _ in node.value]
        repeated = [k for k in keys if keys.count(k) > 1]
        if repeated:
            raise yaml.constructor.ConstructorError(None, None, f"key {repeated[0]!r} is given twice", node.start_mark)
        return node


class _Dumper(yaml.SafeDumper):
    """SafeDumper that puts quotes around text which `_Loader` would read as a number."""


for _one in (_Loader, _Dumper):
    _one.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
    )


# part of what PyYAML says: what it mostly comes from
_MENDS = {
    r"'\t'": "indent with spaces, not with tabs",
    "mapping values are not allowed": "indent keys of a section alike, and put quotes around text that holds a colon",
    "expected ':'": "put a space behind the colon of every key",
    "another document": "remove the line ---",
}


def yaml_of(values: Any) -> str:
    """Plain Python values as text that `parse_yaml` reads as the same, keys in their order."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False)


def parse_yaml(text: str, source: str) -> Any:
    """YAML text as plain Python values; a syntax error is a UserError that names `source` and the line."""
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that no calendar has
        mark = getattr(error, "problem_mark", None)
        where = f"{source}, line {mark.line + 1}" if mark else source
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        if reason.startswith("but "):
            reason = f"{error.context}, {reason}"
        mend = next((mend for part, mend in _MENDS.items() if part in reason), "")
        raise UserError(f"{where}: not valid YAML: {reason}{mend and f'; {mend}'}") from None
