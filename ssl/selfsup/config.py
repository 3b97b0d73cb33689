"""Configuration: frozen pydantic sections, a strict YAML reader, overrides, errors a person can use.

YAML chooses, the command line adjusts. Both are merged into one plain dict and validated once, so
that a fault reads the same wherever it was written: one line with the key, what was expected and
what came.
"""

import difflib
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

SectionT = TypeVar("SectionT", bound="Section")


class Section(BaseModel):
    """A part of the configuration: unknown keys refused, values frozen, attribute docstrings kept."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _as_written(cls, content: Any) -> Any:
        """`none` for no value where a field allows that, a lone value for a list of any length, and true, as
        which an option without its value reads, for no number."""
        if not isinstance(content, dict):
            return content
        read = dict(content)
        for key, value in content.items():
            annotation = cls.model_fields[key].annotation if key in cls.model_fields else None
            parts = typing.get_args(annotation)
            if isinstance(value, bool) and _takes_numbers(annotation):
                value = read[key] = str(value).lower()  # pydantic would take true for 1
            if isinstance(value, str) and value.lower() == "none" and type(None) in parts:
                read[key] = None
            if (
                isinstance(value, (int, float))
                and typing.get_origin(annotation) is tuple
                and parts[-1] is ...
            ):
                read[key] = (value,)
        return read


class _Loader(yaml.SafeLoader):
    """YAML without two traps: the last of two equal keys wins in silence, and 10:20 is the number 620 (base 60).

    Here the one is an error, the other text.
    """

    def resolve(self, kind: type, value: Any, implicit: Any) -> str:
        tag = super().resolve(kind, value, implicit)
        number = tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
        return "tag:yaml.org,2002:str" if number and kind is yaml.ScalarNode and ":" in value else tag

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = sorted({str(key) for key in keys if keys.count(key) > 1})
        if twice:
            raise ValueError(f"line {node.start_mark.line + 1}: key given twice: {', '.join(twice)}")
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises ValueError naming the file for anything else."""
    try:
        content = yaml.load(path.read_text(), Loader=_Loader)  # a SafeLoader
    except OSError as error:
        raise ValueError(f"{path}: cannot read the config: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
        raise ValueError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a mapping of sections, got {type(content).__name__}")
    return content


def parse_overrides(arguments: list[str]) -> dict[str, Any]:
    """`--objective.mask-ratio 0.6 --run.compile` as a nested dict; values are YAML scalars.

    Several values after one key make a list; none makes `true`. Read here and not by tyro, which
    validates every section by itself and so cannot name the whole key of a fault. Raises ValueError
    for a value without a key.
    """
    overrides: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        head = rest.pop(0)
        if not head.startswith("--") or head == "--":
            raise ValueError(f"expected an option like --optim.steps 100, got {head!r}")
        key, equals, attached = head[2:].partition("=")
        values = [attached] if equals else []
        while not equals and rest and not rest[0].startswith("--"):
            values.append(rest.pop(0))
        parsed = [_scalar(value) for value in values]
        *parents, leaf = key.replace("-", "_").split(".")
        section = overrides
        for parent in parents:
            section = section.setdefault(parent, {})
            if not isinstance(section, dict):
                raise ValueError(f"--{key}: {parent} was given a value and a key below it")
        if isinstance(section.get(leaf), dict):
            raise ValueError(f"--{key}: {leaf} was given a value and a key below it")
        section[leaf] = True if not parsed else parsed[0] if len(parsed) == 1 else parsed
    return overrides


def _scalar(text: str) -> Any:
    """A number, true, false or null as YAML reads them; anything else is text, a date or `~/x` too."""
    try:
        value = yaml.load(text, Loader=_Loader)  # a SafeLoader
    except (yaml.YAMLError, ValueError):
        return text
    return value if value is None or isinstance(value, (bool, int, float)) else text


def merge(base: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """`base` with `overrides` laid over it, section by section; neither is changed."""
    merged = dict(base)
    for key, value in overrides.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def validate(section: type[SectionT], content: dict[str, Any]) -> SectionT:
    """The validated section. Raises ValueError, one line a fault, with the full key."""
    try:
        return section.model_validate(content)
    except ValidationError as error:
        lines = [_explain(section, content, fault) for fault in error.errors()]
    raise ValueError("\n".join(lines))


def dump_yaml(section: Section) -> str:
    """The resolved configuration, defaults included, as YAML that `validate` reads back."""
    return yaml.safe_dump(section.model_dump(mode="json"), sort_keys=False)


_BOUNDS = ("greater_than", "greater_than_equal", "less_than", "less_than_equal")
_EXPECTED = {
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "int_type": "a whole number",
    "float_parsing": "a number",
    "float_type": "a number",
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "string_type": "text",
    "literal_error": "one of {expected}",
    "union_tag_invalid": "name to be one of {expected_tags}",
    "union_tag_not_found": "a section with a name",
    "model_type": "a section of keys",
    "model_attributes_type": "a section of keys",
    "tuple_type": "a list",
    "missing": "a value",
    "too_long": "at most {max_length} values",
    "finite_number": "a finite number",
}


def _explain(section: type[Section], content: dict[str, Any], fault: Any) -> str:
    """One pydantic fault as `key: expected ..., got ...`, with the nearest valid name for a typo."""
    tags = _union_tags(section)
    # pydantic's own marks: the member of a union, and the kind of value of data.views.
    location = [
        part
        for i, part in enumerate(fault["loc"])
        if not (i == 1 and part in tags) and part not in ("<preset>", "<list>")
    ]
    listed = any(isinstance(part, int) for part in location)
    key = ".".join(str(part) for part in location)
    kind, context = fault["type"], fault.get("ctx", {})
    if kind == "extra_forbidden":
        owner = _owner(section, location)
        if owner:
            return f"{key}: unknown key; it belongs to {location[0]}.name {owner}"
        near = _nearest_in_list(section, location) if listed else _nearest(section, content, key)
        return f"{key}: unknown key" + (f"; perhaps you meant {near}" if near else "")
    if kind == "missing" and not listed:
        return f"{key}: expected a value, got none; set it in the YAML or with --{key.replace('_', '-')}"
    if kind == "value_error":
        return f"{key}: {context['error']}" if key else str(context["error"])
    if kind in _BOUNDS:
        expected = _range(section, content, location)
    else:
        expected = _EXPECTED[kind].format(**context) if kind in _EXPECTED else fault["msg"].lower()
    return f"{key}: expected {expected}, got {fault['input']!r}"


def _range(section: type[Section], content: dict[str, Any], location: list[Any]) -> str:
    """All bounds of a field, as `0 < x < 1`; pydantic names only the one that was broken."""
    constraints: list[Any] = []
    annotation: Any = section
    for part in location:
        members = _members(annotation)
        if isinstance(part, int) or not members:  # an entry of a tuple
            annotation = _entry(annotation, part)
            constraints, content = _constraints(annotation), {}
            continue
        field = _chosen(members, content)[0].model_fields[part]
        annotation, constraints = field.annotation, field.metadata + _constraints(field.annotation)
        content = content.get(part, {}) if isinstance(content, dict) else {}
    bounds = {
        key: getattr(c, key) for c in constraints for key in ("gt", "ge", "lt", "le") if hasattr(c, key)
    }
    low = f"{bounds['gt']} < " if "gt" in bounds else f"{bounds['ge']} <= " if "ge" in bounds else ""
    high = f" < {bounds['lt']}" if "lt" in bounds else f" <= {bounds['le']}" if "le" in bounds else ""
    return f"{low}x{high}"


def _entry(annotation: Any, i: int) -> Any:
    """The annotation of entry i of a tuple, also where the tuple is one choice of several."""
    parts = typing.get_args(annotation)
    if typing.get_origin(annotation) is tuple:
        return parts[0] if parts[-1] is ... else parts[i]
    return next((found for found in (_entry(part, i) for part in parts) if found is not None), None)


def _nearest_in_list(section: type[Section], location: list[Any]) -> str | None:
    """The valid key closest to a mistyped one of a section in a list: `data.views.1.hu`."""
    annotation: Any = section
    for part in location[:-1]:
        if isinstance(part, int):
            annotation = _entry(annotation, part)
        else:
            owner = next(m for m in _members(annotation) if part in m.model_fields)
            annotation = owner.model_fields[part].annotation
    near = difflib.get_close_matches(location[-1], _members(annotation)[0].model_fields, n=1, cutoff=0.6)
    return ".".join(map(str, [*location[:-1], *near])) if near else None


def _takes_numbers(annotation: Any) -> bool:
    """Whether an annotation is, or holds, int or float."""
    return annotation in (int, float) or any(map(_takes_numbers, typing.get_args(annotation)))


def _constraints(annotation: Any) -> list[Any]:
    """The bounds written inside an annotation: `Annotated[float, Field(ge=0)]`, also under `| None`."""
    found: list[Any] = []
    if typing.get_origin(annotation) is typing.Annotated:
        for extra in typing.get_args(annotation)[1:]:
            found += getattr(extra, "metadata", [extra])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        for part in typing.get_args(annotation):
            found += _constraints(part)
    return found


def _union_tags(section: type[Section]) -> set[str]:
    """The names of all members of the section's unions: pydantic puts them into its locations."""
    members = [m for field in section.model_fields.values() for m in _members(field.annotation)]
    return {_name(m) for m in members} - {None}


def _name(member: type[Section]) -> str | None:
    """The `name` by which a member of a union is chosen; None for a section without one."""
    return member.model_fields["name"].default if "name" in member.model_fields else None


def _chosen(members: list[type[Section]], content: Any) -> list[type[Section]]:
    """The member that the `name` in `content` picks; all of them where it picks none."""
    name = content.get("name") if isinstance(content, dict) else None
    return [m for m in members if name is not None and _name(m) == name] or members


def _members(annotation: Any) -> list[type[Section]]:
    """The Section classes in an annotation, unions opened."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, typing.Annotated):
        return [m for part in typing.get_args(annotation) for m in _members(part)]
    return []


def _owner(section: type[Section], location: list[Any]) -> str | None:
    """The name of the member of a union that has a key which the chosen member refused."""
    field = section.model_fields.get(location[0])
    members = _members(field.annotation) if field and len(location) == 2 else []
    return next((_name(m) for m in members if location[1] in m.model_fields), None)


def _nearest(section: type[Section], content: dict[str, Any], key: str) -> str | None:
    """The valid key closest to a mistyped one: same section first, then anywhere."""
    valid = []
    for name, field in section.model_fields.items():
        members = _chosen(_members(field.annotation), content.get(name))
        valid.append(name)
        for inner, inner_field in (pair for m in members for pair in m.model_fields.items()):
            valid.append(f"{name}.{inner}")
            listed = _members(_entry(inner_field.annotation, 0))
            valid += [f"{name}.{inner}.0.{leaf}" for m in listed for leaf in m.model_fields]
    leaf = key.rsplit(".", 1)[-1]
    elsewhere = [name for name in valid if name.rsplit(".", 1)[-1] == leaf]
    return next(iter(elsewhere + difflib.get_close_matches(key, valid, n=1, cutoff=0.6)), None)
